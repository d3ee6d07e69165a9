"""`verify` from its keys, filters included, as the GPU runs it: tokens of the plain JAX core, and few launches."""

import itertools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest

import specsamp_jax as ss
from pallas_kernels import config, slices
from specsamp_jax.rules import kernels
from specsamp_jax.sampling import streams

pytestmark = [cases.QUICK, pytest.mark.kernels(False)]  # the inputs and the core trace no kernel

SHIPPED = ss.SamplingParams(0.7, 20, 0.8)
ARRAYS = ss.SamplingParams(
    temperature=jnp.array([0.7, 0.0, 1.0]),
    top_k=jnp.array([20, 0, 7]),
    top_p=jnp.array([0.8, 1.0, 0.9]),
    min_p=jnp.array([0.0, 0.0, 0.01]),
)


@pytest.fixture
def check(interpreted, monkeypatch):
    """Compares the kernels with the cores, and returns what both gave."""
    if not cases.ON_GPU:
        monkeypatch.setattr(slices, "num_blocks", lambda *shape: 2)
        # Clusters of 16 blocks take the interpreter minutes.
        monkeypatch.setattr(config, "block_config", lambda batch_size: config.Config(4, rounds=4))

    def check(key, target, sampling, draft, draft_sampling, rule="token", **constants):
        fn = {"token": ss.verify, "block": ss.verify_block, "sigmoid": ss.verify_sigmoid}[rule]

        @jax.jit  # one program in place of hundreds of small ones
        def core(key, target, draft):
            draft = draft._replace(sampling=draft_sampling)
            return fn(key, target, draft, sampling, implementation="xla", **constants)

        expected = core(key, target, draft)
        from_keys = {
            "token": kernels.verify_token_from_keys,
            "block": kernels.verify_block_from_keys,
            "sigmoid": kernels.verify_sigmoid_from_keys,
        }[rule]
        with interpreted():
            words = streams.words(key, target.shape[0])
            got = jax.block_until_ready(from_keys(words, target, sampling, draft, draft_sampling, **constants))
        cases.assert_same(got, expected)
        return got

    return check


def make(seed, batch_size=3, num_draft=1, vocab_size=2100, dtype=jnp.float32, sampling=None, kind="normalizers"):
    """A key, target logits, and drafts sampled from logits of their own."""
    keys = jax.random.split(jax.random.key(seed), 4)

    @jax.jit
    def draw(keys):
        target = 3 * jax.random.normal(keys[0], (batch_size, num_draft + 1, vocab_size))
        logits = (target[:, :-1] + jax.random.normal(keys[1], (batch_size, num_draft, vocab_size))).astype(dtype)
        drawn = [ss.sample(jax.random.fold_in(keys[2], i), logits[:, i], sampling) for i in range(num_draft)]
        return target, logits, *(jnp.stack(part, axis=1) for part in zip(*drawn, strict=True))

    target, logits, tokens, normalizers = draw(keys)
    if kind == "one_hot":
        return keys[3], target.astype(dtype), ss.Draft(tokens)
    return keys[3], target.astype(dtype), ss.Draft(tokens, logits, None, normalizers if kind == "normalizers" else None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "kind"),
    [(SHIPPED, "normalizers"), (SHIPPED, "one_hot"), (ARRAYS, "logits"), (ARRAYS, "normalizers")],
    ids=["numbers-normalizers", "numbers-one_hot", "arrays-logits", "arrays-normalizers"],
)
def test_equals_the_core(check, sampling, kind):
    drafts = None if kind == "one_hot" else sampling
    key, target, draft = make(0, num_draft=2, dtype=jnp.bfloat16, sampling=drafts, kind=kind)
    check(key, target, sampling, draft, drafts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "drafts"),
    [
        (SHIPPED, None),
        (None, SHIPPED),
        (ss.SamplingParams(0.0), SHIPPED),
        (SHIPPED, ss.SamplingParams(0.0)),
        (ss.SamplingParams(1.3, top_p=0.9), ss.SamplingParams(0.8)),
        (ss.SamplingParams(min_p=0.1), ss.SamplingParams(top_k=2099)),
    ],
    ids=["target's", "draft's", "greedy target", "greedy draft", "scaled draft", "others"],
)
def test_filters_of_one_model_alone(check, sampling, drafts):
    key, target, draft = make(1, sampling=drafts)
    check(key, target, sampling, draft, drafts)


@pytest.mark.slow
@pytest.mark.parametrize("row_parts", [4, 1], ids=["apart", "together"])
@pytest.mark.parametrize(("sampling", "drafts"), [(SHIPPED, SHIPPED), (ARRAYS, None)], ids=["numbers", "arrays"])
def test_the_block_rule(check, monkeypatch, sampling, drafts, row_parts):
    monkeypatch.setattr(config, "block_sum_config", lambda *shape: config.Config(2, row_parts=row_parts))
    key, target, draft = make(6, num_draft=3, sampling=drafts, kind="logits")
    check(key, target, sampling, draft, drafts, "block")


@pytest.mark.slow
def test_keys_of_each_row(check):
    key, target, draft = make(2, sampling=SHIPPED)
    check(jax.random.split(key, 3), target, SHIPPED, draft, SHIPPED)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("sampling", [None, ss.SamplingParams(0.8)])
def test_without_filters(check, sampling, rule):
    key, target, draft = make(3, sampling=sampling)
    check(key, target, sampling, draft, sampling, rule)


@pytest.mark.slow
def test_without_drafts(check):
    key, target, draft = make(4, num_draft=1)
    draft = ss.Draft(draft.tokens[:, :0])
    check(key, target[:, :1], SHIPPED, draft, None)


@pytest.mark.slow
@pytest.mark.parametrize("num_multiprocessors", [132, 1])
def test_ragged_drafts_degenerate_rows_and_unusable_normalizers(check, monkeypatch, num_multiprocessors):
    monkeypatch.setattr(config, "num_multiprocessors", lambda: num_multiprocessors)
    key, target, draft = make(5, batch_size=6, num_draft=2, sampling=SHIPPED)
    tokens = draft.tokens.at[0, 1:].set(-1).at[1, 0].set(2100).at[5].set(-1)
    normalizers = draft.log_normalizers.at[2].set(jnp.nan).at[3, 0].set(1e9)
    target = target.at[3, 1, 7].set(jnp.nan).at[4, 0].set(-jnp.inf)
    logits = draft.logits.at[4, 0].set(jnp.nan).at[5].set(jnp.nan)
    got = check(key, target, SHIPPED, ss.Draft(tokens, logits, None, normalizers), SHIPPED)
    assert got.status[1] == ss.DEGENERATE_DRAFT
    assert got.status[4] & ss.DEGENERATE_TARGET


@pytest.mark.slow
def test_a_vocabulary_smaller_than_a_tile(check):
    sampling = ss.SamplingParams(top_k=5, top_p=0.9)
    key, target, draft = make(6, vocab_size=31, sampling=sampling)
    check(key, target, sampling, draft._replace(tokens=draft.tokens.at[0, 0].set(31)), sampling)


@pytest.mark.slow
def test_the_sigmoid_rule(check):
    key, target, draft = make(7, sampling=SHIPPED)
    check(key, target, SHIPPED, draft, SHIPPED, rule="sigmoid", alpha=-10.0, beta=10.0)


def program(step, arrays, batch_size=8):
    """The text of a verification compiled for a GPU, at V 151,936 and K 4."""
    sampling = SHIPPED
    if arrays:
        sampling = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.full((batch_size,), x), SHIPPED))
    sizes = (batch_size, 5, 151936), (batch_size, 4, 151936), (batch_size, 4), (batch_size, 4)
    dtypes = jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.float32
    shapes = (jax.ShapeDtypeStruct(*one) for one in zip(sizes, dtypes, strict=True))
    args = jax.eval_shape(lambda: jax.random.key(0)), *shapes
    if arrays:
        traced = jax.jit(step).trace(*args, sampling)
    else:
        traced = jax.jit(lambda *args: step(*args, sampling)).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def verify(key, target, drafted, tokens, normalizers, sampling):
    return ss.verify(key, target, ss.Draft(tokens, drafted, sampling, normalizers), sampling)


def verify_unfiltered(key, target, drafted, tokens, normalizers, sampling):
    del sampling
    return ss.verify(key, target, ss.Draft(tokens, drafted, None, normalizers))


def sample(key, target, drafted, tokens, normalizers, sampling):
    del drafted, tokens, normalizers
    return ss.sample(key, target[:, 0], sampling)


def sample_unfiltered(key, target, drafted, tokens, normalizers, sampling):
    del drafted, tokens, normalizers, sampling
    return ss.sample(key, target[:, 0], ss.SamplingParams(0.7))


LAUNCHES = [
    *((verify, 8, 2), (verify, 64, 3), (verify_unfiltered, 8, 2)),
    *((sample, 8, 1), (sample, 64, 2), (sample_unfiltered, 8, 2)),
]
# On every push: lists of candidates, no filters, and a search of cutoffs in clusters.
EACH_PUSH = {(verify, 64): False, (verify_unfiltered, 8): False, (sample, 8): True}


def launch_cases():
    cases = []
    for arrays, (step, batch_size, launches) in itertools.product((False, True), LAUNCHES):
        slow = EACH_PUSH.get((step, batch_size)) != arrays
        if step is sample and arrays:
            launches = 1  # Lists of a top-k that is data may be long: the blocks of a row share the work.
        cases.append(pytest.param(step, batch_size, launches, arrays, marks=[pytest.mark.slow] if slow else []))
    return cases


@pytest.mark.kernels
@pytest.mark.parametrize(("step", "batch_size", "launches", "arrays"), launch_cases())
def test_few_launches_and_neither_loop_nor_sort(step, batch_size, launches, arrays):
    text = program(step, arrays, batch_size)
    assert text.count("custom_call @mosaic_gpu") == launches
    assert "stablehlo.while" not in text
    assert "stablehlo.sort" not in text
    # Threefry runs in the kernels.
    assert "stablehlo.shift_left" not in text
