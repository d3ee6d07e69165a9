"""Argument validation: the error names the argument, the expected and the actual value."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax import _checks
from specsamp_jax.rules import verify as verify_module
from specsamp_jax.sampling import draw, streams

B, K, V = 2, 3, 5
KEY = jax.random.key(0)
TARGET = jnp.zeros((B, K + 1, V))
TOKENS = jnp.zeros((B, K), int)
LOGITS = jnp.zeros((B, K, V))


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """Switches jaxtyping off, so that the library's own errors are raised."""
    for module in (_checks, streams, draw, verify_module):
        for name, fn in inspect.getmembers(module, inspect.isfunction):
            monkeypatch.setattr(module, name, inspect.unwrap(fn))


def call(name, *args, **kwargs):
    return inspect.unwrap(getattr(ss, name))(*args, **kwargs)


def assert_told(message, name, *args, **kwargs):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(name, *args, **kwargs)


@pytest.mark.parametrize("name", ["verify", "verify_sigmoid", "sample"])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (7, "key must be a JAX key, as jax.random.key or jax.random.PRNGKey makes it, or one of them per row; got 7."),
        (None, "or one of them per row; got NoneType."),
        (np.zeros(2, np.int32), "or one of them per row; got int32[2]."),
        (jnp.zeros(3, jnp.uint32), "or one of them per row; got uint32[3]."),
        (jnp.uint32(0), "or one of them per row; got uint32[]."),
        (jnp.zeros((3, 4), jnp.uint32), "key must be one key, or one per row with shape [B] = [2]; got shape [3]."),
        (
            jax.random.split(KEY, 3),
            "key must be one key, or one per row with shape [B] = [2]; got shape [3].",
        ),
        (jax.random.split(KEY, (2, 2)), "or one per row with shape [B] = [2]; got shape [2, 2]."),
    ],
)
def test_key(name, key, message):
    arguments = (TARGET[:, 0],) if name == "sample" else (TARGET, ss.Draft(TOKENS))
    assert_told(message, name, key, *arguments)


@pytest.mark.parametrize("name", ["verify", "verify_sigmoid"])
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            jnp.zeros((B, K + 1, V), int),
            "target_logits must be of a floating-point type; got int32[2, 4, 5]. Are they token ids?",
        ),
        (jnp.zeros((B, V)), "target_logits must have shape [B, K+1, V]; got float32[2, 5]."),
        (
            np.zeros((B, K + 1, V)).tolist(),
            "target_logits must be a JAX or NumPy array; got list. jnp.asarray makes one.",
        ),
        (np.full((B, K + 1, V), None), "target_logits must be of a floating-point type; got object[2, 4, 5]."),
        (
            jnp.zeros((B, K + 1, 0)),
            "target_logits must hold at least one token on its last axis; got float32[2, 4, 0].",
        ),
    ],
)
def test_target_logits(name, target, message):
    assert_told(message, name, KEY, target, ss.Draft(TOKENS))


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (jnp.zeros((B, V), int), "logits must be of a floating-point type; got int32[2, 5]. Are they token ids?"),
        (jnp.zeros((B, 1, V)), "logits must have shape [B, V]; got float32[2, 1, 5]."),
        (np.zeros((B, V), [("a", "f4")]), "logits must be of a floating-point type; got void32[2, 5]."),
        # Where C's long double has 64 bits, JAX takes it.
        *(
            (np.zeros((B, V), kind), f"logits must be of a floating-point type; got {np.dtype(kind).name}[2, 5].")
            for kind in [np.longdouble]
            if np.dtype(kind).itemsize > 8
        ),
        (jnp.zeros((B, 0)), "logits must hold at least one token on its last axis; got float32[2, 0]."),
    ],
)
def test_logits_of_sample(logits, message):
    assert_told(message, "sample", KEY, logits)


DRAFTS = {
    "no Draft": (TOKENS, "draft must be a Draft; got ArrayImpl. For a deterministic drafter, Draft(tokens) is enough."),
    "listed tokens": (ss.Draft([[0] * K] * B), "draft.tokens must be a JAX or NumPy array; got list."),
    "float tokens": (
        ss.Draft(jnp.zeros((B, K))),
        "draft.tokens must be of a signed integer type, because -1 ends a draft; got float32[2, 3].",
    ),
    "unsigned tokens": (ss.Draft(TOKENS.astype("uint32")), "because -1 ends a draft; got uint32[2, 3]."),
    "no bonus row": (
        ss.Draft(jnp.zeros((B, K + 1), int)),
        "draft.tokens must have shape [B, K] = [2, 3] beside target_logits [B, K+1, V] = [2, 4, 5]; got int32[2, 4]. "
        "Is the target's row for the bonus token missing?",
    ),
    "another batch": (ss.Draft(jnp.zeros((1, K), int)), "draft.tokens must have shape [B, K] = [2, 3]"),
    "whole logits": (
        ss.Draft(TOKENS, LOGITS.astype(int)),
        "draft.logits must be of a floating-point type; got int32[2, 3, 5]. Are they token ids?",
    ),
    "another vocabulary": (
        ss.Draft(TOKENS, LOGITS[..., :4]),
        "draft.logits must have shape [B, K, V] = [2, 3, 5]; got float32[2, 3, 4]. "
        "Both models must share one vocabulary: pad the shorter logits with -inf.",
    ),
    "sampling of nothing": (
        ss.Draft(TOKENS, sampling=ss.SamplingParams()),
        "draft.sampling needs draft.logits, which are None: leave draft.sampling None.",
    ),
    "normalizers of nothing": (
        ss.Draft(TOKENS, log_normalizers=jnp.zeros((B, K))),
        "draft.log_normalizers need draft.logits, which are None: leave draft.log_normalizers None.",
    ),
    "truth for normalizers": (
        ss.Draft(TOKENS, LOGITS, log_normalizers=jnp.zeros((B, K), bool)),
        "draft.log_normalizers must be of a floating-point type; got bool[2, 3]. They are the second",
    ),
    "complex normalizers": (
        ss.Draft(TOKENS, LOGITS, log_normalizers=jnp.zeros((B, K), complex)),
        "draft.log_normalizers must be of a floating-point type; got complex64[2, 3].",
    ),
    "listed normalizers": (
        ss.Draft(TOKENS, LOGITS, log_normalizers=[[0.0] * K] * B),
        "draft.log_normalizers must be a JAX or NumPy array; got list.",
    ),
    "normalizers of another shape": (
        ss.Draft(TOKENS, LOGITS, log_normalizers=jnp.zeros((B, K + 1))),
        "draft.log_normalizers must have shape [B, K] = [2, 3]; got float32[2, 4].",
    ),
}


@pytest.mark.parametrize("name", ["verify", "verify_sigmoid"])
@pytest.mark.parametrize("kind", DRAFTS)
def test_draft(name, kind):
    draft, message = DRAFTS[kind]
    assert_told(message, name, KEY, TARGET, draft)


SAMPLINGS = {
    "no SamplingParams": (0.7, "{name} must be a SamplingParams; got float."),
    "shape": (
        ss.SamplingParams(temperature=jnp.ones(3)),
        "{name}.temperature must be a scalar or have one value per row, [B] = [2]; got float32[3].",
    ),
    "part of a token": (ss.SamplingParams(top_k=2.5), "{name}.top_k must be a whole number; got 2.5."),
    "parts of tokens": (ss.SamplingParams(top_k=jnp.ones(2)), "{name}.top_k must be a whole number; got float32[2]."),
    "beyond int32": (
        ss.SamplingParams(top_k=2**31),
        "{name}.top_k must be in [0, 2147483647] (0 is off); got 2147483648.",
    ),
    "NumPy beyond int32": (ss.SamplingParams(top_k=np.int64(2**40)), "{name}.top_k must be in [0, 2147483647]"),
    "none": (
        ss.SamplingParams(temperature=None),
        "{name}.temperature must be a number, or an array of numbers with shape [B]; got NoneType.",
    ),
    "a word": (ss.SamplingParams(temperature="0.7"), "{name}.temperature must be a number, or an array of numbers"),
    "a list": (ss.SamplingParams(temperature=[0.7, 0.7]), "an array of numbers with shape [B]; got list."),
    "truth": (
        ss.SamplingParams(top_p=True),
        "{name}.top_p must be a number, or an array of numbers with shape [B]; got T",
    ),
    "truths": (ss.SamplingParams(min_p=jnp.ones(2, bool)), "an array of numbers with shape [B]; got bool[2]."),
    "complex": (
        ss.SamplingParams(top_p=0.5j),
        "{name}.top_p must be a number, or an array of numbers with shape [B]; got",
    ),
    "a huge int": (ss.SamplingParams(temperature=10**400), "must be below 2**31 where it is a Python int; got 1000000"),
    "cold": (ss.SamplingParams(temperature=-1.0), "{name}.temperature must be in [0, inf] (0 is greedy); got -1.0."),
    "NaN": (ss.SamplingParams(temperature=np.nan), "{name}.temperature must be in [0, inf] (0 is greedy); got nan."),
    "negative": (ss.SamplingParams(top_k=-1), "{name}.top_k must be in [0, 2147483647] (0 is off); got -1."),
    "percent": (ss.SamplingParams(top_p=95.0), "{name}.top_p must be in [0, 1] (1 is off); got 95.0."),
    "one of two": (
        ss.SamplingParams(min_p=jnp.array([0.5, 1.5])),
        "{name}.min_p must be in [0, 1] (0 is off); got [0.5 1.5].",
    ),
}


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_sampling(kind):
    params, message = SAMPLINGS[kind]
    for name in ("verify", "verify_sigmoid"):
        assert_told(message.format(name="sampling"), name, KEY, TARGET, ss.Draft(TOKENS), params)
        draft = ss.Draft(TOKENS, LOGITS, params)
        assert_told(message.format(name="draft.sampling"), name, KEY, TARGET, draft)
    assert_told(message.format(name="sampling"), "sample", KEY, TARGET[:, 0], params)


def test_values_that_only_the_program_knows_are_not_looked_at():
    traced = jax.eval_shape(
        lambda top_p: call("verify", KEY, TARGET, ss.Draft(TOKENS), ss.SamplingParams(top_p=top_p)), jnp.float32(95)
    )
    assert traced.tokens.shape == (B, K + 1)


def test_the_ends_of_the_ranges_are_inside():
    for params in (ss.SamplingParams(0.0, 0, 0.0, 0.0), ss.SamplingParams(np.inf, 2**31 - 1, 1, 1)):
        jax.eval_shape(lambda params=params: call("sample", KEY, TARGET[:, 0], params))


@pytest.mark.parametrize("name", ["verify", "verify_sigmoid"])
def test_implementation(name):
    arguments = (name, KEY, TARGET, ss.Draft(TOKENS))
    assert_told('implementation must be None, "xla" or "pallas"; got \'cuda\'.', *arguments, implementation="cuda")
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match='implementation "pallas"'):
            jax.eval_shape(lambda: call(*arguments, implementation="pallas"))


@pytest.mark.parametrize("name", ["residual_logits", "acceptance_rate", "accept_prob"])
def test_atoms(name):
    more = (TOKENS,) if name == "accept_prob" else ()
    assert_told(
        "target_logits and draft_logits must have one shape [..., V]; got float32[2, 4, 5] and float32[2, 3, 5]. "
        "Is the target's bonus row among them?",
        name,
        TARGET,
        LOGITS,
        *more,
    )
    assert_told(
        "must have one shape [..., V]; got float32[] and float32[].", name, jnp.float32(0), jnp.float32(0), *more
    )
    empty = LOGITS[..., :0]
    assert_told("target_logits must hold at least one token on its last axis; got", name, empty, empty, *more)
    for target, draft, which in ((LOGITS.astype(int), LOGITS, "target"), (LOGITS, LOGITS.astype(int), "draft")):
        message = f"{which}_logits must be of a floating-point type; got int32[2, 3, 5]. Are they token ids?"
        assert_told(message, name, target, draft, *more)


def test_tokens_of_accept_prob():
    message = "tokens must have the logits' shape without V, [2, 3]; got [2, 4]."
    assert_told(message, "accept_prob", LOGITS, LOGITS, jnp.zeros((B, K + 1), int))
    for tokens, came in (([[0] * K] * B, "list"), (LOGITS[..., 0], "float32[2, 3]"), (TOKENS > 0, "bool[2, 3]")):
        with pytest.raises(ValueError, match=re.escape("tokens must be ")) as error:
            call("accept_prob", LOGITS, LOGITS, tokens)
        assert f"; got {came}." in str(error.value)
    assert call("accept_prob", LOGITS[0, 0], LOGITS[0, 0], 1) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 2), "acceptance_rate must be in [0, 1] (per draft); got 1.5."),
        ((-0.5, 2), "acceptance_rate must be in [0, 1] (per draft); got -0.5."),
        ((np.nan, 2), "acceptance_rate must be in [0, 1] (per draft); got nan."),
        (([0.5], 2), "acceptance_rate must be a number, or an array of numbers; got list."),
        ((1j, 2), "acceptance_rate must be a number, or an array of numbers; got 1j."),
        ((0.5, -1), "num_draft must be in [0, 2147483647] (drafts per step); got -1."),
        ((0.5, "2"), "num_draft must be a number, or an array of numbers; got str."),
    ],
)
def test_arguments_of_expected_num_tokens(arguments, message):
    assert_told(message, "expected_num_tokens", *arguments)
