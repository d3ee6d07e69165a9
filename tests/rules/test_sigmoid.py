"""The sigmoid rule: agreement with the paper, and how it differs from the released code and from the exact law."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import BELOW_ONE, OFF, as_arrays, in_tiles, with_uniforms

import specsamp_jax as ss
from specsamp_jax._types import Filter, Uniforms
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.sampling import rows as dist

pytestmark = pytest.mark.optimised(False)

B, K, V, TILE = 256, 3, 29, 8
ALPHA, BETA = 1.0, 2.5
RELEASED = {"alpha": -1e4, "beta": 1e4}

SETTINGS = [
    OFF,
    {**OFF, "temperature": 0.7},
    {**OFF, "top_k": 5},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
]


narrow_rule = with_uniforms(sigmoid_rule.verify_sigmoid, TILE, alpha=ALPHA, beta=BETA)
released_rule = with_uniforms(sigmoid_rule.verify_sigmoid, TILE, **RELEASED)


@pytest.fixture(scope="module")
def case():
    """Target, settings, draft and uniforms of B rows; target and draft are filtered alike."""
    rng = np.random.default_rng(0)
    target = rng.normal(size=(B, K + 1, V)) * 2
    logits = target[:, :K] + rng.normal(size=(B, K, V))
    target[rng.random(target.shape) < 0.1] = -np.inf
    target, logits = target.astype(np.float32), logits.astype(np.float32)
    settings = [SETTINGS[i] for i in rng.integers(len(SETTINGS), size=B)]
    tokens = rng.integers(V, size=(B, K)).astype(np.int32)
    tokens = np.where(rng.random((B, K)) < 0.7, logits.argmax(-1), tokens).astype(np.int32)
    tokens[np.arange(K) >= rng.choice(K + 1, size=B, p=[0.1, 0.1, 0.1, 0.7])[:, None]] = -1
    accept, emit = (rng.random((B, n), np.float32) for n in (K, 2))
    accept[rng.random(accept.shape) < 0.05], accept[rng.random(accept.shape) < 0.05] = 0, BELOW_ONE
    return target, settings, ss.Draft(tokens, logits, as_arrays(settings)), Uniforms(accept, emit)


def kept(logits, setting):
    """Logits after temperature, -inf where filtered out; None if float32 may keep other tokens than float64."""
    z = np.asarray(logits, float)
    top_p = setting["top_p"]
    near = [{**setting, "top_p": top_p if top_p == 1 else top_p * share} for share in (1, 1 - 2e-6, 1 + 2e-6)]
    p, *others = (np.array([oracle.distribution(row, **s) for row in z]) > 0 for s in near)
    same = all(np.array_equal(p, other) for other in others)
    return np.where(p, z / setting["temperature"], -np.inf) if same else None


@pytest.mark.parametrize(("rule", "alpha", "beta"), [(narrow_rule, ALPHA, BETA), (released_rule, *RELEASED.values())])
def test_random_rows_agree_with_the_oracle(case, rule, alpha, beta):
    target, settings, draft, uniforms = case
    result = jax.tree.map(np.asarray, rule(target, as_arrays(settings), draft, uniforms))
    compared = 0
    for b, setting in enumerate(settings):
        z_p, z_q = kept(target[b], setting), kept(draft.logits[b], setting)
        if z_p is None or z_q is None:
            continue
        tokens, u, emit = draft.tokens[b], uniforms.accept[b], uniforms.emit[b]
        accept_prob = oracle.sigmoid_accept_probs(z_p, z_q, tokens, alpha, beta)
        np.testing.assert_allclose(result.accept_prob[b], accept_prob, rtol=1e-5)
        n = 0
        while n < K and tokens[n] >= 0 and u[n] < accept_prob[n]:
            n += 1
        rejects = n < K and tokens[n] >= 0
        if rejects:
            weights = oracle.sigmoid_residual(z_p[n], z_q[n], alpha, beta)
        else:
            weights = oracle.sigmoid_bonus(z_p[n], alpha, beta)
        near = np.abs(accept_prob - u)[: n + rejects] < 1e-5
        # A residual of nearly equal scores is a difference of rounded logits.
        if np.any(near) or oracle.emission_margin(weights, *emit, TILE) < 1e-4:
            continue
        compared += 1
        emitted = [*tokens[:n], oracle.sample_two_level(weights, *emit, TILE)]
        assert result.tokens[b].tolist() == emitted + [-1] * (K - n)
        assert result.num_accepted[b] == n
        # The log-probabilities are those of the softmax target.
        p = np.array([oracle.distribution(row, **setting) for row in target[b].astype(float)])
        with np.errstate(divide="ignore"):
            expected = np.log(p[range(n + 1), emitted])
        np.testing.assert_allclose(result.log_probs[b, : n + 1], expected, rtol=1e-5, atol=2e-5)
        assert result.status[b] == 0
    assert compared > 0.8 * B


def test_the_residual_of_nearly_equal_scores_keeps_its_digits(case):
    target, draft = case[0][:, :1], case[2].logits[:, :1]

    @jax.jit
    def weights(target, draft):
        return sigmoid_rule._residual(*(dist.target_rows(z, Filter()) for z in (target, draft)), V, **RELEASED)

    # At this width the scores differ by 1e-5: subtracted, they would agree to two digits.
    for z_p, z_q, row in zip(target[:, 0], draft[:, 0], np.asarray(weights(target, draft), float), strict=True):
        np.testing.assert_allclose(row / row.sum(), oracle.sigmoid_residual(z_p, z_q, **RELEASED), rtol=1e-4, atol=1e-9)


def test_the_residual_of_scores_far_apart_is_finite():
    # exp(200) is infinite in float32, and the scores beside it are zero.
    z_p = np.array([[[-100.0, 0.0, 3.0, -40.0]]], np.float32)
    z_q = np.array([[[100.0, 0.5, -2.0, 60.0]]], np.float32)
    p, q = (dist.target_rows(jnp.asarray(z), Filter()) for z in (z_p, z_q))
    weights = np.asarray(sigmoid_rule._residual(p, q, 4, 0.0, 1.0), float)[0]
    np.testing.assert_allclose(weights / weights.sum(), oracle.sigmoid_residual(z_p[0, 0], z_q[0, 0], 0.0, 1.0))


# The law of what the library emits

Z_P = np.array([[1.0, 0.0, -1.0, 0.5], [0.0, 2.0, 0.5, -0.5], [-1.0, 0.3, 1.2, 0.0]], np.float32)
Z_Q = np.array([[0.0, 1.0, -0.5, 0.5], [1.0, 1.0, -1.0, 0.0]], np.float32)
NUM_DRAWS = 200_000


def emitted(alpha, beta, setting=OFF, certain=None):
    """Emitted tokens of many steps with fixed logits, and the distributions q of the drafts."""
    q = [oracle.distribution(z.astype(float), **setting) for z in Z_Q]
    if certain is not None:
        q = [oracle.one_hot(token, 4) for token in certain]
    rng = np.random.default_rng(1)
    tokens = np.stack([rng.choice(len(row), size=NUM_DRAWS, p=row) for row in q], axis=1).astype(np.int32)
    rows = [np.tile(z, (NUM_DRAWS, 1, 1)) for z in (Z_P, Z_Q)]

    def step(key, target_logits, tokens, logits):
        sampling = ss.SamplingParams(**setting)
        draft = ss.Draft(tokens) if certain is not None else ss.Draft(tokens, logits, sampling)
        return ss.verify_sigmoid(key, target_logits, draft, sampling, alpha=alpha, beta=beta).tokens

    return in_tiles(2, step)(jax.random.key(0), rows[0], tokens, rows[1]), np.array(q)


def test_emitted_tokens_follow_the_papers_law(assert_law):
    tokens, q = emitted(ALPHA, BETA)
    assert_law(tokens, oracle.sigmoid_step_law(Z_P, Z_Q, q, ALPHA, BETA))
    with pytest.raises(AssertionError):
        assert_law(tokens, oracle.speculative_law(lambda s: oracle.distribution(Z_P[len(s)]), lambda s: q[len(s)], 2))


def masked(rows, setting):
    """Logits after temperature, -inf where the setting filters them out."""
    return np.array(
        [np.where(oracle.distribution(z, **setting) > 0, z / setting["temperature"], -np.inf) for z in rows]
    )


@pytest.mark.parametrize(
    "setting",
    [
        {**OFF, "temperature": 0.7, "top_k": 3, "top_p": 0.9},
        *(
            pytest.param({**OFF, **each}, marks=pytest.mark.slow)
            for each in ({"temperature": 0.7}, {"top_k": 2}, {"top_p": 0.7})
        ),
    ],
)
def test_filtered_rows_follow_the_papers_law(assert_law, setting):
    tokens, q = emitted(ALPHA, BETA, setting)
    z_p, z_q = (masked(rows.astype(float), setting) for rows in (Z_P, Z_Q))
    assert_law(tokens, oracle.sigmoid_step_law(z_p, z_q, q, ALPHA, BETA))


def test_one_hot_drafts_follow_the_papers_law(assert_law):
    tokens, q = emitted(ALPHA, BETA, certain=(1, 0))
    # A score of one at the drafted token, and of zero elsewhere.
    certain = np.where(q > 0, np.inf, -np.inf)
    assert_law(tokens, oracle.sigmoid_step_law(Z_P, certain, q, ALPHA, BETA))


# Properties and edges


def test_equal_models_accept_everything(case):
    target, settings, draft, uniforms = case
    tokens = target[:, :K].argmax(-1).astype(np.int32)
    equal = draft._replace(tokens=tokens, logits=target[:, :K])
    uniforms = uniforms._replace(accept=np.full((B, K), BELOW_ONE, np.float32))
    result = narrow_rule(target, as_arrays(settings), equal, uniforms)
    assert np.all(result.accept_prob == 1)
    assert np.all(result.num_accepted == K)


def test_greedy_rows_are_exact(case):
    target, _, draft, uniforms = case
    greedy = as_arrays([{**OFF, "temperature": 0.0}] * B)
    largest = target.argmax(-1)
    result = narrow_rule(target, greedy, draft._replace(sampling=as_arrays([OFF] * B)), uniforms)
    n = np.cumprod(draft.tokens == largest[:, :K], axis=1).sum(1)
    assert np.array_equal(result.num_accepted, n)
    assert np.array_equal(result.tokens, np.where(np.arange(K + 1) <= n[:, None], largest, -1))
    assert not np.any(result.log_probs)


def test_a_filtered_token_is_neither_accepted_nor_emitted(case):
    target, settings, draft, uniforms = case
    for emit in (0, BELOW_ONE):
        uniforms = Uniforms(np.zeros((B, K), np.float32), np.full((B, 2), emit, np.float32))
        result = jax.tree.map(np.asarray, narrow_rule(target, as_arrays(settings), draft, uniforms))
        for b, setting in enumerate(settings):
            z = kept(target[b], setting)
            if z is not None:
                n = result.num_accepted[b]
                assert np.all(z[range(n + 1), result.tokens[b, : n + 1]] > -np.inf)


@pytest.mark.parametrize(
    ("values", "token"), [([np.nan, 1.0], 1), ([np.inf, 1.0], 0), ([-np.inf, -np.inf], 0), ([np.nan, np.nan], 0)]
)
def test_a_degenerate_row_sets_the_status_where_it_emits(case, values, token):
    target, _, draft, uniforms = case
    row = np.full(V, values[1])
    row[0] = values[0]
    params = as_arrays([OFF] * B)
    tokens = target[:, :K].argmax(-1).astype(np.int32)
    draft = ss.Draft(tokens, target[:, :K], params)
    uniforms = uniforms._replace(accept=np.zeros((B, K), np.float32))
    spoilt = target.copy()
    spoilt[:, K] = row
    result = narrow_rule(spoilt, params, draft, uniforms)
    assert np.all(result.tokens[:, K] == token)
    assert np.all(result.log_probs[:, K] == -np.inf)
    assert np.all(result.status == ss.DEGENERATE_TARGET)
    # The draft's row is degenerate: the draft is rejected, and the token is drawn from the target.
    spoilt = target[:, :K].copy()
    spoilt[:, 0] = np.nan
    result = narrow_rule(target, params, draft._replace(logits=spoilt), uniforms)
    assert np.all(result.num_accepted == 0)
    assert np.all(result.status == ss.DEGENERATE_DRAFT)
    assert not np.any(result.accept_prob[:, 0])


@pytest.mark.parametrize("chance", [True, False])
def test_a_draft_outside_the_vocabulary_is_replaced_by_a_token_of_the_target(case, chance):
    target, _, draft, uniforms = case
    params = as_arrays([OFF] * B)
    tokens = target[:, :K].argmax(-1).astype(np.int32)
    tokens[:, 1] = V + 3
    draft = draft._replace(tokens=tokens, sampling=params) if chance else ss.Draft(tokens)
    uniforms = uniforms._replace(accept=np.zeros((B, K), np.float32))
    result = narrow_rule(target, params, draft, uniforms)
    assert np.all(result.num_accepted == 1)
    assert np.all(result.status == ss.DEGENERATE_DRAFT)
    less = narrow_rule(target, params, draft._replace(tokens=np.where(tokens < V, tokens, -1)), uniforms)
    assert np.array_equal(result.tokens, less.tokens)
    assert np.all(less.status == 0)


def test_an_empty_residual_is_flagged(case):
    target, _, draft, uniforms = case
    params = as_arrays([OFF] * B)
    tokens = target[:, :K].argmax(-1).astype(np.int32)
    # The draft's scores are above the target's everywhere.
    draft = ss.Draft(tokens, np.maximum(target[:, :K], -50) + 3, params)
    uniforms = uniforms._replace(accept=np.full((B, K), 0.9999, np.float32))
    result = narrow_rule(target, params, draft, uniforms)
    assert np.all(result.num_accepted == 0)
    assert np.all(result.status == ss.EMPTY_RESIDUAL)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, -2.0), (0.0, np.nan)])
def test_beta_is_above_alpha(alpha, beta):
    logits = jnp.zeros((1, 2, 4))
    draft = ss.Draft(jnp.zeros((1, 1), int), logits[:, :1])
    with pytest.raises(ValueError, match=f"beta must be above alpha; got alpha = {alpha}, beta = {beta}"):
        ss.verify_sigmoid(jax.random.key(0), logits, draft, alpha=alpha, beta=beta)


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (None, 1.0, "alpha must be a Python number, because it is compiled in; got None."),
        (0.0, "1", "beta must be a Python number, because it is compiled in; got '1'."),
        (False, True, "alpha must be a Python number, because it is compiled in; got False."),
        # With infinite widths all scores would be NaN, or one half.
        (-np.inf, 1.0, "beta - alpha must be a width from 1.2e-38 to 3.4e+38, in float32; got alpha = -inf"),
        (0, 10**60, "in float32; got alpha = 0, beta = 1e+60."),
        (-3e38, 3e38, "in float32; got alpha = -3e+38, beta = 3e+38."),
        (0.0, 1e-320, "in float32; got alpha = 0, beta = 1e-320."),
    ],
)
def test_the_width_is_a_float32(alpha, beta, message):
    logits = jnp.zeros((1, 2, 4))
    draft = ss.Draft(jnp.zeros((1, 1), int), logits[:, :1])
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect.unwrap(ss.verify_sigmoid)(jax.random.key(0), logits, draft, alpha=alpha, beta=beta)


# Differences from the exact law and from the released implementation


def total_variation(p, q):
    return np.abs(p - q).sum() / 2


def test_at_the_released_width_nearly_every_draft_is_accepted(case):
    target, _, draft, uniforms = case
    off = as_arrays([OFF] * B)
    result = released_rule(target, off, draft._replace(sampling=off), uniforms)
    accept_prob = np.asarray(result.accept_prob)
    b, i = np.nonzero(accept_prob > 0)
    x = draft.tokens[b, i]
    z_p, z_q = target[b, i, x], draft.logits[b, i, x]
    assert accept_prob[b, i].min() > 0.9998
    # 0.3775 is 1 - sigmoid(1/2), and 2e4 the width.
    np.testing.assert_allclose(accept_prob[b, i], np.minimum(1 - 0.3775 * (z_q - z_p) / 2e4, 1), atol=1e-6)
    exact = [
        oracle.accept_probs(
            *([oracle.distribution(z[j].astype(float))] for z in (target[row], draft.logits[row])), [token]
        )
        for row, j, token in zip(b, i, x, strict=True)
    ]
    assert np.mean(exact) < 0.8


def test_at_the_released_width_emitted_tokens_follow_the_draft():
    p, q = (np.array([oracle.distribution(z.astype(float)) for z in rows]) for rows in (Z_P, Z_Q))
    law = oracle.sigmoid_step_law(Z_P, Z_Q, q, **RELEASED)
    first = np.array([sum(mass for tokens, mass in law.items() if tokens[0] == x) for x in range(4)])
    assert total_variation(first, q[0]) < 1e-4
    assert total_variation(first, p[0]) > 0.2
    # The bonus distribution is nearly uniform.
    assert total_variation(oracle.sigmoid_bonus(Z_P[2], **RELEASED), np.full(4, 0.25)) < 1e-4


def test_a_width_of_one_above_the_logsumexp_is_close_to_exact():
    z = Z_P[0].astype(float)
    lse = np.logaddexp.reduce(z)
    p = oracle.distribution(z)
    assert total_variation(oracle.sigmoid_bonus(z, lse, lse + 1), p) < 0.1
    assert total_variation(oracle.sigmoid_bonus(z, lse + np.log(100), lse + np.log(100) + 1), p) < 0.002


def test_the_released_acceptance_is_the_papers_at_that_width(case):
    target, _, draft, uniforms = case
    off = as_arrays([OFF] * B)
    result = released_rule(target, off, draft._replace(sampling=off), uniforms)
    for b in range(B):
        released = oracle.sigmoid_as_released_accept_probs(target[b], draft.logits[b], draft.tokens[b])
        np.testing.assert_allclose(result.accept_prob[b], released, rtol=1e-6)


def test_the_released_bonus_is_neither_softmax_nor_sigmoid():
    z = np.array([3.0, 2.0, -1.0, -4.0])
    np.testing.assert_allclose(oracle.sigmoid_as_released_bonus(z), [0.6, 0.4, 0, 0], atol=1e-5)
    # Adding a constant to the logits changes the released bonus, but hardly changes the paper's.
    assert total_variation(oracle.sigmoid_as_released_bonus(z), oracle.sigmoid_as_released_bonus(z + 10)) > 0.2
    assert total_variation(oracle.sigmoid_bonus(z, **RELEASED), oracle.sigmoid_bonus(z + 10, **RELEASED)) < 1e-4
    assert total_variation(oracle.sigmoid_as_released_bonus(z), oracle.distribution(z)) > 0.1


@pytest.mark.parametrize(("vocab_size", "uniform_share"), [(32_000, 0.24), (256_000, 0.72)])
def test_the_released_residual_has_a_large_uniform_part(vocab_size, uniform_share):
    z_p, z_q = (np.full(vocab_size, -2e4) for _ in range(2))
    z_p[7] = 5.0
    released = oracle.sigmoid_as_released_residual(z_p, z_q)
    np.testing.assert_allclose(1 - released[7], uniform_share, atol=0.005)
    assert oracle.sigmoid_residual(z_p, z_q, **RELEASED)[7] > 0.99
    assert np.all(released > 0)


def test_the_released_step_ends_without_bonus_at_the_end_token():
    tokens = np.array([3, 1, 2])
    assert not oracle.sigmoid_as_released_emits_bonus(tokens, 3, eos_token=2)
    assert oracle.sigmoid_as_released_emits_bonus(tokens, 3, eos_token=1)
    assert not oracle.sigmoid_as_released_emits_bonus(tokens, 2, eos_token=1)
