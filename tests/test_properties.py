"""Properties of the rules and of `sample` over shapes, types, supports and parameters.

`HYPOTHESIS_PROFILE=thorough` runs thousands of examples of each instead of some hundreds.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from hypothesis import given
from hypothesis import strategies as st
from inputs import as_arrays

import specsamp_jax as ss

B = 3
CASES = [(0, 1, "bfloat16", False), (2, 7, "float32", False), (3, 12, "float32", True)]
"""K, V, the logits' type, and whether the draft has logits. Each is compiled once per rule: all else is data."""
LONG = [(1, 16_400, "float32", True)]
"""Rows beyond the bounds of what is folded, added up in chunks and drawn from in tiles; drawn less often."""
THOROUGH = hypothesis.settings.get_current_profile_name() == "thorough"
if THOROUGH:
    LONG += [(1, 8_191, "float32", True), (1, 8_193, "bfloat16", True)]
CASES_OF = {
    "verify": CASES * 3 + LONG,
    # The other rules read and draw from rows as `verify` does: fewer programs by default.
    "verify_block": CASES * 3 + LONG if THOROUGH else [CASES[0], CASES[2]],
    "verify_sigmoid": CASES * 3 + LONG if THOROUGH else CASES[1:],
}

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
RULES = {
    "verify": quick_jit(functools.partial(ss.verify, implementation="xla")),
    "verify_block": quick_jit(ss.verify_block),
}
# So wide that no score underflows: the least logit is about -5,000, after a temperature of .05.
verify_sigmoid = quick_jit(functools.partial(ss.verify_sigmoid, implementation="xla", alpha=-50.0, beta=50.0))
sample = quick_jit(ss.sample)

seeds = st.integers(0, 2**32 - 1)
settings = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1.0]) | st.floats(0.05, 20),
        "top_k": st.integers(0, 14),
        "top_p": st.just(1.0) | st.floats(0, 1),
        "min_p": st.just(0.0) | st.floats(0, 1),
    }
)


@st.composite
def logit_rows(draw, num_rows, vocab_size):
    """`[B, num_rows, V]` logits: spread or flat, with ties, with tokens that are impossible, but never all."""
    rng = np.random.default_rng(draw(seeds))
    logits = rng.normal(size=(B, num_rows, vocab_size)) * draw(st.sampled_from([0.1, 1.0, 5.0, 30.0]))
    logits += draw(st.sampled_from([0.0, -100.0, 1000.0]))
    if draw(st.booleans()):
        logits = np.round(logits)
    impossible = rng.random(logits.shape) < draw(st.sampled_from([0.0, 0.3, 0.95]))
    impossible[..., rng.integers(vocab_size)] = False
    return np.where(impossible, -np.inf, logits)


@st.composite
def steps(draw, rule):
    num_draft, vocab_size, dtype, has_logits = draw(st.sampled_from(CASES_OF[rule]))
    target = draw(logit_rows(num_draft + 1, vocab_size)).astype(dtype)
    tokens = draw(st.lists(st.integers(-1, vocab_size), min_size=B * num_draft, max_size=B * num_draft))
    draft = ss.Draft(jnp.array(tokens, jnp.int32).reshape(B, num_draft))
    rows = [draw(settings) for _ in range(B)]
    if has_logits:
        logits = draw(logit_rows(num_draft, vocab_size)).astype(dtype)
        draft = draft._replace(logits=logits, sampling=as_arrays([draw(settings) for _ in range(B)]))
    return jax.random.key(draw(seeds)), target, draft, rows


def support(logits, setting):
    """Tokens that float32 may keep, and those that it must: within rounding of a bound it may go either way."""
    kept = []
    # As float32 holds them.
    setting = {name: float(np.float32(value)) for name, value in setting.items()} | {"top_k": setting["top_k"]}
    if setting["temperature"] > 0 and setting["top_p"] == 1 and setting["min_p"] == 0:
        # Top-k keeps the same tokens at any temperature, but in float64 those of a low one underflow to probability 0.
        setting["temperature"] = max(setting["temperature"], 1.0)
    for share in (1, 1 - 1e-5, 1 + 1e-5):
        top_p, min_p = setting["top_p"], setting["min_p"]
        near = {
            "top_p": top_p if top_p == 1 else min(top_p * share, 1 - 1e-12),
            "min_p": min(min_p * share, 1),
        }
        kept.append(oracle.distribution(np.asarray(logits, np.float64), **{**setting, **near}) > 0)
    return np.any(kept, axis=0), np.all(kept, axis=0)


def assert_a_verification(result, target, draft, rows):
    """The form of a result, and that nothing impossible was emitted or accepted."""
    result = jax.tree.map(np.asarray, result)
    tokens, num_draft = np.asarray(draft.tokens), draft.tokens.shape[1]
    vocab_size = target.shape[-1]
    assert np.all((result.accept_prob >= 0) & (result.accept_prob <= 1))
    for b, (n, setting) in enumerate(zip(result.num_accepted, rows, strict=True)):
        drafted = next((i for i, token in enumerate(tokens[b]) if token < 0), num_draft)
        assert 0 <= n <= drafted
        assert result.tokens[b, :n].tolist() == tokens[b, :n].tolist()
        assert 0 <= result.tokens[b, n] < vocab_size
        assert np.all(result.tokens[b, n + 1 :] == ss.PAD_TOKEN)
        assert not np.any(result.log_probs[b, n + 1 :])
        assert not np.any(result.accept_prob[b, drafted:])
        assert not result.status[b] & ss.DEGENERATE_TARGET
        for i, token in enumerate(result.tokens[b, : n + 1]):
            possible, _ = support(target[b, i], setting)
            assert possible[token]
            assert -np.inf < result.log_probs[b, i] <= 0
        for i in range(drafted):
            if tokens[b, i] >= vocab_size or not support(target[b, i], setting)[0][tokens[b, i]]:
                assert result.accept_prob[b, i] == 0
                assert n <= i
        if n < drafted and tokens[b, n] >= vocab_size:
            assert result.status[b] & ss.DEGENERATE_DRAFT


@given(data=st.data(), rule=st.sampled_from(list(RULES)))
def test_exact_rules(data, rule):
    key, target, draft, rows = data.draw(steps(rule))
    result = RULES[rule](key, target, draft, as_arrays(rows))
    assert_a_verification(result, target, draft, rows)


@given(step=steps("verify_sigmoid"))
def test_the_sigmoid_rule(step):
    key, target, draft, rows = step
    assert_a_verification(verify_sigmoid(key, target, draft, as_arrays(rows)), target, draft, rows)


@given(step=steps("verify"))
def test_accept_prob_without_filters_is_the_oracles(step):
    key, target, draft, _ = step
    off = as_arrays([{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}] * B)
    draft = draft._replace(sampling=None if draft.logits is None else off)
    result = RULES["verify"](key, target, draft, off)
    vocab_size = target.shape[-1]
    accept_prob = np.asarray(result.accept_prob)
    for b, tokens in enumerate(np.asarray(draft.tokens)):
        stop = next((i for i, token in enumerate(tokens) if not 0 <= token < vocab_size), len(tokens))
        p = [oracle.distribution(np.asarray(row, np.float64)) for row in target[b]]
        for i, token in enumerate(tokens[:stop]):
            one_hot = oracle.one_hot(token, vocab_size)
            q = one_hot if draft.logits is None else oracle.distribution(np.asarray(draft.logits[b, i], np.float64))
            # A drafted token of probability zero under q says nothing, and float32 has no probabilities below 1e-37.
            if q[token] > 1e-30 and p[i][token] > 1e-30:
                expected = min(1, p[i][token] / q[token])
                np.testing.assert_allclose(accept_prob[b, i], expected, rtol=2e-3)


@given(data=st.data(), case=st.sampled_from([(1, "float32"), (7, "float32"), (12, "bfloat16")]))
def test_samples(data, case):
    vocab_size, dtype = case
    logits = data.draw(logit_rows(1, vocab_size))[:, 0].astype(dtype)
    rows = [data.draw(settings) for _ in range(B)]
    result = sample(jax.random.key(data.draw(seeds)), logits, as_arrays(rows))
    tokens, log_normalizers = (np.asarray(array) for array in result)
    for row, setting, token, log_normalizer in zip(logits, rows, tokens, log_normalizers, strict=True):
        possible, certain = support(row, setting)
        assert possible[token]
        if setting["temperature"] > 0 and np.array_equal(possible, certain):
            kept = np.asarray(row, np.float64)[possible] / float(np.float32(setting["temperature"]))
            np.testing.assert_allclose(log_normalizer, np.logaddexp.reduce(kept), rtol=1e-5, atol=1e-4)
