"""Wrong arguments of the decoding loop, and batches without rows."""

import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding import memory

pytestmark = pytest.mark.optimised(False)

TARGET, DRAFT = tables.model(tables.table(0)), tables.model(tables.table(1))
NO_CACHE = ss.Model(np.eye(4), lambda eye, tokens, positions, cache: (eye[tokens], cache), lambda *sizes: ())
NARROW = ss.Model(DRAFT.params, DRAFT.apply_fn, lambda *sizes: tables.init_cache_fn(*sizes)[..., None])
PROMPT = np.array([[1, 2, 3], [2, 0, 0], [3, 1, 0]])
V = tables.VOCAB
PROMPT_MESSAGE = f"prompt must hold token ids from 0 to V - 1 = {V - 1}, the target's vocabulary; got "
EOS_MESSAGE = f"eos_token must be None, a token id from 0 to {V - 1}, or several of them; got "


def returning(order):
    """The target with other outputs."""
    return ss.Model(TARGET.params, lambda *inputs: order(*TARGET.apply_fn(*inputs)), TARGET.init_cache_fn)


LOGITS_ALONE = returning(lambda logits, cache: logits)
SWAPPED = returning(lambda logits, cache: (cache, logits))
WHOLE = returning(lambda logits, cache: (logits.astype(int), cache))
NESTING = ss.Model(np.eye(V), lambda eye, tokens, positions, cache: (eye[tokens], (cache,)), lambda *sizes: ())
LENGTHENING = ss.Model(
    np.eye(V),
    lambda eye, tokens, positions, cache: (eye[tokens], {"seen": jnp.pad(cache["seen"], (0, 1))}),
    lambda *sizes: {"seen": jnp.zeros(3)},
)

WRONG = [
    ({"prompt": PROMPT + 2**33}, PROMPT_MESSAGE + "8589934593. Does the tokenizer belong to this model?"),
    ({"prompt": PROMPT + V}, PROMPT_MESSAGE + "5."),
    ({"prompt": jnp.asarray(PROMPT) - 5}, PROMPT_MESSAGE + "-4."),
    ({"prompt": PROMPT.tolist()}, "prompt must be a JAX or NumPy array; got list. jnp.asarray makes one."),
    ({"prompt": PROMPT > 1}, "prompt must be token ids of shape [B, P], at least one per row; got bool[3, 3]."),
    ({"prompt_lengths": np.ones(3)}, "prompt_lengths must be of an integer type; got float32[3]."),
    ({"prompt_lengths": [1, 1, 1]}, "prompt_lengths must be a JAX or NumPy array; got list."),
    *(
        ({"eos_token": eos_token}, EOS_MESSAGE + came)
        for eos_token, came in [
            (1.7, "1.7."),
            (True, "True."),
            (V, f"{V}."),
            (-1, "-1."),
            (2**40, "1099511627776."),
            ([[1]], "list."),
            ([1, 2.0], "2.0."),
            ("2", "str."),
            (np.array([[1]]), "int32[1, 1]."),
            (np.array([1.0]), "float32[1]."),
            (jnp.array([1, 9]), "[1 9]."),
        ]
    ),
    ({"draft": ss.ModelDrafter(DRAFT, ss.SamplingParams(-1.0))}, "draft.sampling.temperature must be in [0, inf]"),
    ({"draft": ss.ConfidenceDrafter(DRAFT, 1.5)}, "draft.threshold must be in [0, 1] (0 never stops); got 1.5."),
    (
        {"draft": ss.ConfidenceDrafter(DRAFT, 0.5, ss.SamplingParams(top_p=2.0))},
        "draft.sampling.top_p must be in [0, 1]",
    ),
    (
        {"num_draft": True},
        "num_draft must be a Python int, HeuristicNumDraft or GoodputNumDraft, for it sets shapes; got True.",
    ),
    ({"max_new_tokens": True}, "max_new_tokens must be a Python int of at least 1; got True."),
    (
        {"target": LOGITS_ALONE},
        "apply_fn must return (logits [B, T, V], cache) for tokens [B, T] = [3, 3]; got float32",
    ),
    ({"target": SWAPPED}, "its first item is int32[3, 9]. Are logits and cache swapped?"),
    ({"draft": SWAPPED}, "its first item is int32[3, 9]. Are logits and cache swapped?"),
    (
        {"target": NESTING},
        "apply_fn must return a cache like the one that it was given, because steps run in a loop; it was given "
        "PyTreeDef(()) and returned PyTreeDef(((),)).",
    ),
    ({"target": LENGTHENING}, "cache['seen'] was float32[3] and became float32[4]."),
    ({"draft": LENGTHENING}, "cache['seen'] was float32[3] and became float32[4]."),
    ({"verify_fn": "block"}, "verify_fn must be a rule, such as specsamp_jax.verify_block; got 'block'."),
    ({"verify_fn": None}, "verify_fn must be a rule, such as specsamp_jax.verify_block; got None."),
    (
        {"process_logits_fn": "mask"},
        "process_logits_fn must be None or callable as (tokens [B, L], lengths [B], logits",
    ),
    (
        {"process_logits_fn": lambda tokens, lengths, logits: logits[:, :3]},
        f"process_logits_fn must return logits of the shape that it was given, [B, V] = [3, {V}]; got [3, 3].",
    ),
    (
        {"process_logits_fn": lambda tokens, lengths, logits: None},
        "The result of process_logits_fn must be a JAX or NumPy array; got NoneType.",
    ),
    ({"target": WHOLE}, "logits of apply_fn must be of a floating-point type; got int32[3, 3, 4]."),
]


@pytest.mark.parametrize("fn", [ss.generate, ss.stream])
@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_argument_is_reported(fn, change, message):
    arguments = {"key": jax.random.key(0), "prompt": PROMPT, "target": TARGET, "draft": DRAFT, "max_new_tokens": 4}
    arguments |= {"num_draft": 2} | change
    key, prompt = arguments.pop("key"), arguments.pop("prompt")
    run = inspect.unwrap(fn)
    if fn is ss.stream and callable(change.get("process_logits_fn")):  # its first step is the first to call it
        run = lambda *inputs, **options: next(ss.stream(*inputs, **options))  # noqa: E731
    with pytest.raises(ValueError, match=re.escape(message)):
        run(key, prompt, **arguments)


@pytest.mark.parametrize("fn", [ss.generate, ss.stream])
def test_a_prompt_on_explicit_mesh_axes_is_reported(fn):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    prompt = jax.device_put(PROMPT, jax.NamedSharding(mesh, jax.P("data")))
    with pytest.raises(
        ValueError, match=re.escape("prompt must not be sharded over explicit mesh axes; got axes data.")
    ):
        fn(jax.random.key(0), prompt, target=TARGET, draft=DRAFT, max_new_tokens=4)


def test_two_rows_of_logits_alone_are_not_taken_for_a_pair():
    with pytest.raises(ValueError, match=re.escape("A model without a cache returns () as the cache.")):
        ss.generate(jax.random.key(0), PROMPT[:2], target=LOGITS_ALONE, draft=None, max_new_tokens=2)


def test_padding_of_a_prompt_may_hold_any_ids():
    padded = np.array([[1, 2, 3], [2, -1, 2**33], [3, 1, 99]])
    options = {"target": TARGET, "draft": DRAFT, "max_new_tokens": 3, "prompt_lengths": np.array([3, 1, 2])}
    result, expected = (ss.generate(jax.random.key(0), prompt, **options) for prompt in (padded, PROMPT))
    assert (result.tokens == expected.tokens).all()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((None, 4), (NO_CACHE, 4), "state must have 4 columns in tokens [B, W] for drafts after those of log_probs"),
        (
            (ss.NGramDrafter(), 2),
            (ss.NGramDrafter(), 3),
            "got 2, of W = 8 and L = 6. Was the state made by `init` with",
        ),
        ((DRAFT, 2), (None, 2), "state must have 0 columns in tokens [B, W] for drafts"),
        ((ss.NGramDrafter(), 2), (DRAFT, 2), "Was the state made by `init` with another `draft`?"),
        (
            (ss.NGramDrafter(), 2),
            (ss.ConfidenceDrafter(DRAFT), 2),
            "Was the state made by `init` with another `draft`?",
        ),
        ((DRAFT, 2), (ss.NGramDrafter(), 2), "state.draft_state must be the drafter's own, PyTreeDef(()); got"),
        ((DRAFT, 2), (NARROW, 2), "state.draft_state must be the drafter's own, [(3, 8, 1)]; got [(3, 8)]."),
    ],
)
def test_a_state_of_another_drafter_raises_an_error(first, second, message):
    def run(key, prompt):
        state = ss.init(prompt, target=TARGET, draft=first[0], num_draft=first[1], max_new_tokens=3)
        return ss.step(key, state, target=TARGET, draft=second[0], num_draft=second[1])

    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(run, jax.random.key(0), PROMPT)


@pytest.mark.parametrize("draft", [DRAFT, ss.ConfidenceDrafter(DRAFT)])
def test_a_text_that_memory_cannot_hold_is_reported_before_it_is_allocated(monkeypatch, draft):
    models = {"target": TARGET, "draft": draft, "num_draft": 2}
    calls = (
        functools.partial(ss.generate, jax.random.key(0)),
        functools.partial(ss.stream, jax.random.key(0)),
        ss.init,
    )
    # Ids and log-probabilities of the state and of the result, two caches of int32, and the logits of 3 + 2 tokens.
    needed = 3 * (3 + 7 + 2) * (16 + 2 * 4) + 3 * (3 + 2) * V * 4
    asked = []

    def free_bytes(platform):
        asked.append(platform)
        return needed - 1

    monkeypatch.setattr(memory, "free_bytes", free_bytes)
    for call in calls:
        with pytest.raises(
            ValueError, match=re.escape("max_new_tokens = 7 after prompts of 3 tokens, with drafts of 2")
        ):
            call(PROMPT, **models, max_new_tokens=7)
    assert asked == [jax.default_backend()] * 3
    # A program that is traced may run elsewhere.
    jax.eval_shape(functools.partial(ss.init, **models, max_new_tokens=7), PROMPT)
    for free in (needed, None):
        monkeypatch.setattr(memory, "free_bytes", lambda platform, free=free: free)
        memory.check(PROMPT, (TARGET, DRAFT), max_new_tokens=7, longest_draft=2)
    monkeypatch.undo()
    assert 10**8 < memory.free_bytes() < 10**14
    with pytest.raises(
        ValueError, match=re.escape("take 2,147,483,648 positions per row; positions must be below 2**31")
    ):
        jax.eval_shape(functools.partial(ss.init, **models, max_new_tokens=2**31 - 5), PROMPT)


def test_init_and_step_look_at_ids_too():
    with pytest.raises(ValueError, match=re.escape(PROMPT_MESSAGE)):
        ss.init(PROMPT + V, target=TARGET, draft=None, max_new_tokens=3)
    models = {"target": TARGET, "draft": None}
    state = jax.eval_shape(functools.partial(ss.init, **models, max_new_tokens=3), PROMPT)
    with pytest.raises(ValueError, match=re.escape(EOS_MESSAGE)):
        jax.eval_shape(functools.partial(ss.step, **models, eos_token=V), jax.random.key(0), state)


STATE = jax.eval_shape(functools.partial(ss.init, target=TARGET, draft=None, max_new_tokens=3), PROMPT)
GOODPUT = ss.GoodputNumDraft((1.0, 1.5), (0, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, "state must be a DecodeState, as init returns it; got a NoneType."),
        ({"state": tuple(STATE)}, "state must be a DecodeState, as init returns it; got a tuple."),
        ({"target": TARGET.params}, "target must be a Model; got "),
        ({"draft": 5}, "draft must be a Model, a drafter with `propose`, or None; got int."),
        ({"draft": ss.NGramDrafter}, "draft must be a Model, a drafter with `propose`, or None; got "),
        ({"num_draft": 1.5}, "num_draft must be a Python int, HeuristicNumDraft or GoodputNumDraft, for it sets"),
        ({"num_draft": ss.HeuristicNumDraft}, "num_draft must be a Python int, HeuristicNumDraft or GoodputNumDraft"),
        ({"verify_fn": "block"}, "verify_fn must be a rule, such as specsamp_jax.verify_block; got 'block'."),
        ({"process_logits_fn": "mask"}, "process_logits_fn must be None or callable as (tokens"),
        ({"verify_fn": lambda *arguments: None}, "verify_fn must return a Verification; got a NoneType."),
        (
            {"verify_fn": lambda *arguments: ss.verify(*arguments)._replace(tokens=jnp.zeros((1, 1), int))},
            "verify_fn must return tokens of shape [B, K+1] = [3, 1]; got [1, 1].",
        ),
    ],
)
def test_a_wrong_argument_of_step_is_reported(change, message):
    arguments = {"target": TARGET, "draft": None} | change

    def run(key, state):
        return inspect.unwrap(ss.step)(key, **{"state": state} | arguments)

    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(run, jax.random.key(0), STATE)


@pytest.mark.parametrize(
    ("first", "second"), [(2, GOODPUT), (GOODPUT, 2), (GOODPUT, ss.GoodputNumDraft((1.0, 1.2, 1.5), (0, 1, 2)))]
)
def test_a_state_of_another_draft_length_raises_an_error(first, second):
    options = {"target": TARGET, "draft": ss.NGramDrafter()}

    def run():
        return ss.step(
            jax.random.key(0),
            ss.init(jnp.asarray(PROMPT), **options, num_draft=first, max_new_tokens=3),
            **options,
            num_draft=second,
        )

    with pytest.raises(ValueError, match=re.escape("Was the state made by `init` with another `num_draft`?")):
        jax.eval_shape(run)


@pytest.mark.parametrize(
    ("proposed", "message"),
    [
        (None, "propose of the drafter must return (Draft, state); got a NoneType."),
        (ss.Draft(np.zeros((3, 2), "i4")), "propose of the drafter must return (Draft, state); got a Draft."),
        ((ss.Draft(np.zeros((3, 2), "f4")), ()), "tokens of the proposed Draft must be of an integer type; got float"),
        ((ss.Draft(np.zeros((1, 2), "i4")), ()), "must have shape [B, num_draft] = [3, 2]; got [1, 2]."),
        ((ss.Draft(np.zeros((3, 1), "i4")), ()), "must have shape [B, num_draft] = [3, 2]; got [3, 1]."),
    ],
)
def test_a_wrong_result_of_a_drafter_is_reported(proposed, message):
    class Drafter(ss.NGramDrafter):
        def propose(self, *arguments, **options):
            return proposed

    draft = jax.tree_util.register_static(Drafter)()
    with pytest.raises(ValueError, match=re.escape(message)):
        ss.generate(jax.random.key(0), PROMPT, target=TARGET, draft=draft, num_draft=2, max_new_tokens=3)


class Forgetful:
    """A rule that has a state, and does not return it."""

    def init(self, batch_size):
        return jnp.zeros(batch_size)

    def __call__(self, key, target_logits, draft, sampling, state):
        return ss.verify(key, target_logits, draft, sampling)


def test_a_rule_with_a_state_returns_it():
    message = "verify_fn must return (Verification, state), because it has `init`; got a Verification."
    options = {"target": TARGET, "draft": DRAFT, "max_new_tokens": 2, "verify_fn": Forgetful()}
    with pytest.raises(ValueError, match=re.escape(message)):
        ss.generate(jax.random.key(0), PROMPT, **options)


def test_init_checks_the_parameters_of_the_drafter():
    drafter = ss.ModelDrafter(DRAFT, ss.SamplingParams(-1.0))
    with pytest.raises(ValueError, match=re.escape("draft.sampling.temperature must be in [0, inf]")):
        ss.init(PROMPT, target=TARGET, draft=drafter, max_new_tokens=3)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], "HeuristicNumDraft.lengths must be a tuple, because each length is compiled; got [1, 2]."),
        ((1.5,), "Each of HeuristicNumDraft.lengths must be a Python int of at least 1; got 1.5."),
        ((True,), "Each of HeuristicNumDraft.lengths must be a Python int of at least 1; got True."),
    ],
)
def test_lengths_are_a_tuple_of_whole_numbers(lengths, message):
    # Without the types that only tests check.
    rule = object.__new__(ss.HeuristicNumDraft)
    vars(rule).update(initial=1, increase=2, decrease=1, lengths=lengths)
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect.unwrap(ss.HeuristicNumDraft.__post_init__)(rule)


@pytest.mark.parametrize(
    ("draft", "num_draft"),
    [
        (DRAFT, ss.HeuristicNumDraft(2, lengths=(1, 2))),
        (DRAFT, ss.GoodputNumDraft((1.0, 1.1), (0, 1), prior=(0.5,))),
        (ss.ConfidenceDrafter(DRAFT), 2),
        (None, 2),
    ],
)
def test_a_batch_of_no_rows_has_a_result(draft, num_draft):
    options = {"target": TARGET, "draft": draft, "num_draft": num_draft, "max_new_tokens": 3}
    empty = PROMPT[:0]
    whole = ss.generate(jax.random.key(0), empty, **options)
    assert whole.tokens.shape == (0, 6)
    assert whole.stats.num_steps == 0
    (last,) = ss.stream(jax.random.key(0), empty, **options)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, last, whole))


def test_a_models_first_pass_is_traced_once():
    counted, traces = tables.counted()
    target = ss.Model(TARGET.params, counted, tables.init_cache_fn)
    ss.generate(jax.random.key(0), PROMPT, target=target, draft=None, max_new_tokens=2)
    # The vocabulary's size comes from the trace that the prompts need anyway.
    assert traces.count(PROMPT.shape) == 1
    traced = len(traces)
    # Nor is the size looked up by another trace in the next call, with other weights.
    other = ss.Model(TARGET.params + 1, counted, tables.init_cache_fn)
    ss.generate(jax.random.key(0), PROMPT, target=other, draft=None, max_new_tokens=2)
    assert len(traces) == traced
    for _ in range(2):
        list(ss.stream(jax.random.key(0), PROMPT, target=other, draft=None, max_new_tokens=2))
        traced, before = len(traces), traced
    assert traced == before
