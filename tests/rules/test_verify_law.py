"""The output law: K+1 tokens enumerated at V = 4, K = 2, and compared with 200,000 draws by chi-square."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import OFF, as_arrays, in_tiles

import specsamp_jax as ss
from specsamp_jax.sampling import streams

NUM_DRAWS, V, K = 200_000, 4, 2
TILE = 2

FILTERED = {"temperature": 0.8, "top_k": 3, "top_p": 0.95, "min_p": 0.05}
WARM = {**OFF, "temperature": 1.5}
GREEDY = {**OFF, "temperature": 0.0}


def table(seed, sharpness):
    """Random logits, some -inf, by the last two tokens; index V stands for a missing token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(V + 1, V + 1, V)) * sharpness
    return np.where(rng.random(logits.shape) < 0.1, -np.inf, logits).astype(np.float32)


# Seeds with which a rejected first draft of either tile is replaced by tokens of both tiles.
TARGET, DRAFT = table(1, 1.5), table(2, 1.0)


def logits_after(table, tokens):
    """The logits that follow each row of tokens `[B, n]`."""
    before = jnp.pad(tokens, ((0, 0), (K - tokens.shape[1], 0)), constant_values=V)
    return jnp.asarray(table)[before[:, 0], before[:, 1]]


def law_of(table, setting):
    """Function from a prefix to the oracle's distribution of the next token."""
    return functools.cache(
        lambda prefix: oracle.distribution(table[(V,) * (K - len(prefix)) + prefix].astype(float), **setting)
    )


# With tiles of two tokens, a row of four has two tiles and is not padded to 1,024.
compiled = functools.partial(in_tiles, TILE)
row_keys = jax.jit(streams.row_keys, static_argnums=1)
verify = compiled(ss.verify)


@compiled
def sampled_drafts(keys, sampling):
    """Samples K tokens per row, one after the other. The first uses the keys of the verification unchanged."""
    tokens, logits, log_normalizers = jnp.zeros((NUM_DRAWS, 0), jnp.int32), [], []
    for i in range(K):
        logits.append(logits_after(DRAFT, tokens))
        token, log_normalizer = ss.sample(streams.fold_in(keys, i) if i else keys, logits[i], sampling)
        tokens = jnp.concatenate([tokens, token[:, None].astype(jnp.int32)], axis=1)
        log_normalizers.append(log_normalizer)
    return ss.Draft(tokens, jnp.stack(logits, axis=1), sampling, jnp.stack(log_normalizers, axis=1))


CERTAIN = (2, 1)
"""Tokens of a deterministic drafter."""


def certain_drafts():
    return ss.Draft(jnp.tile(jnp.array(CERTAIN, jnp.int32), (NUM_DRAWS, 1)))


@jax.jit
def target_logits(tokens):
    return jnp.stack([logits_after(TARGET, jnp.maximum(tokens[:, :i], 0)) for i in range(K + 1)], axis=1)


@compiled
def completed(keys, tokens, sampling):
    """K+1 tokens per row: the emitted ones, then tokens sampled from the target."""
    for i in range(1, K + 1):
        own, _ = ss.sample(streams.fold_in(keys, K + i), logits_after(TARGET, tokens[:, :i]), sampling)
        tokens = tokens.at[:, i].set(jnp.where(tokens[:, i] < 0, own, tokens[:, i]))
    return tokens


def step(key, setting, draft_setting=None, stop=None):
    """Emitted tokens and their completion to K+1; drafting ends after the token `stop`.

    Drafts are sampled with the key of the verification.
    """
    keys, sampling = row_keys(key, NUM_DRAWS), as_arrays(setting)
    draft = certain_drafts() if draft_setting is None else sampled_drafts(keys, as_arrays(draft_setting))
    if stop is not None:
        tokens = np.array(draft.tokens)
        tokens[tokens[:, 0] == stop, 1] = -1
        draft = draft._replace(tokens=jnp.asarray(tokens))
    emitted = verify(key, target_logits(draft.tokens), draft, sampling).tokens
    return emitted, completed(keys, emitted, sampling)


def make_key(kind):
    return jax.random.key(0) if kind == "one key" else jax.random.split(jax.random.key(1), NUM_DRAWS)


# Each kind of key and each setting on every push, all pairs with the slow tests.
KEYS_AND_SETTINGS = [
    pytest.param("one key", OFF, id="one key, plain"),
    pytest.param("one key per row", FILTERED, id="one key per row, filtered"),
    pytest.param("one key", FILTERED, id="one key, filtered", marks=pytest.mark.slow),
    pytest.param("one key per row", OFF, id="one key per row, plain", marks=pytest.mark.slow),
]


@pytest.fixture
def assert_exact(assert_law):
    """A test of a step with sampled drafts: the law of the emitted tokens, and the target's law of K+1 tokens."""

    def assert_exact(key, setting, draft_setting):
        emitted, all_tokens = step(key, setting, draft_setting)
        p, q = law_of(TARGET, setting), law_of(DRAFT, draft_setting)
        assert_law(emitted, oracle.speculative_law(p, q, K))
        assert_law(all_tokens, oracle.target_law(p, K + 1))

    return assert_exact


@pytest.mark.parametrize(("kind", "setting"), KEYS_AND_SETTINGS)
def test_sampled_drafts(assert_exact, kind, setting):
    assert_exact(make_key(kind), setting, setting)


@pytest.mark.parametrize(
    ("setting", "draft_setting"), [(FILTERED, WARM), (OFF, GREEDY), (GREEDY, OFF)], ids=["warm", "greedy", "to greedy"]
)
def test_drafts_with_other_sampling_parameters_than_the_target(assert_exact, setting, draft_setting):
    assert_exact(jax.random.key(3), setting, draft_setting)


@pytest.mark.parametrize("stop", [1, *(pytest.param(stop, marks=pytest.mark.slow) for stop in (0, 2, 3))])
def test_sampled_drafts_that_end_early(assert_law, stop):
    emitted, all_tokens = step(jax.random.key(2), OFF, OFF, stop)
    first = np.asarray(emitted[:, 0])
    assert np.all(np.asarray(emitted)[first == stop, 2] == -1)
    assert_law(all_tokens, oracle.target_law(law_of(TARGET, OFF), K + 1))


@pytest.mark.parametrize(("kind", "setting"), KEYS_AND_SETTINGS)
def test_deterministic_drafts(assert_law, kind, setting):
    emitted, all_tokens = step(make_key(kind), setting)
    p = law_of(TARGET, setting)
    assert_law(emitted, oracle.speculative_law(p, lambda prefix: oracle.one_hot(CERTAIN[len(prefix)], V), K))
    assert_law(all_tokens, oracle.target_law(p, K + 1))


def test_a_wrong_law_fails_the_test(assert_law):
    """Laws of slightly warmer models are rejected, so the tests above can fail."""
    emitted, all_tokens = step(jax.random.key(0), OFF, OFF)
    warmer = law_of(TARGET, {**OFF, "temperature": 1.1})
    for tokens, law in (
        (all_tokens, oracle.target_law(warmer, K + 1)),
        (emitted, oracle.speculative_law(law_of(TARGET, OFF), law_of(DRAFT, {**OFF, "temperature": 1.1}), K)),
    ):
        with pytest.raises(AssertionError):
            assert_law(tokens, law)
