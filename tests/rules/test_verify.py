"""The token rule: small cases by hand, the oracle on equal uniforms, properties, boundary draws, degenerate rows."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import BELOW_ONE, OFF, as_arrays, with_uniforms

import specsamp_jax as ss
from specsamp_jax._types import Uniforms
from specsamp_jax.rules.token import verify_token

# test_verify_law and test_verify_rows compile the rule with all optimisations.
pytestmark = pytest.mark.optimised(False)

B, K, V, TILE = 256, 3, 29, 8
SETTINGS = [
    OFF,
    {**OFF, "temperature": 0.7},
    {**OFF, "top_k": 5},
    {**OFF, "top_p": 0.7},
    {**OFF, "min_p": 0.2},
    {**OFF, "temperature": 0.0},
    {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.3, "top_k": 40, "top_p": 0.95, "min_p": 0.0},
]


jit_rule = with_uniforms(verify_token, TILE)


def numpy_verification(result):
    return ss.Verification(*map(np.asarray, result))


# Small cases by hand


def step(p, q, tokens, u, emit=(0.5, 0.5), setting=OFF):
    """Runs the rule on one row, padded with zero probabilities and copied to the compiled shape [B, K+1, V]."""

    def log(rows):
        with np.errstate(divide="ignore"):
            rows = np.log(np.array(rows, np.float32))
        full = np.full((len(rows), V), -np.inf, np.float32)
        full[:, : rows.shape[1]] = rows
        return np.tile(full, (B, 1, 1))

    draft = ss.Draft(jnp.full((B, K), jnp.array(tokens)), None if q is None else log(q))
    if q is not None:
        draft = draft._replace(sampling=as_arrays([OFF] * B))
    uniforms = Uniforms(jnp.full((B, K), jnp.array(u, jnp.float32)), jnp.full((B, 2), jnp.array(emit, jnp.float32)))
    result = numpy_verification(jit_rule(log(p), as_arrays([setting] * B), draft, uniforms))
    return jax.tree.map(lambda field: field[0].tolist(), result)


P = [[0.5, 0.25, 0.25, 0], [0, 0.5, 0.25, 0.25], [0.25, 0.25, 0, 0.5], [0, 0, 0, 1]]
Q = [[0.25, 0.75, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0]]


def test_accepting_all_adds_the_bonus_token_of_the_last_row():
    result = step(P, Q, [0, 1, 1], [0.99, 0.99, 0.99])
    assert (result.tokens, result.num_accepted, result.status) == ([0, 1, 1, 3], 3, 0)
    np.testing.assert_allclose(result.log_probs, np.log([0.5, 0.5, 0.25, 1]), rtol=1e-6)
    np.testing.assert_allclose(result.accept_prob, [1, 1, 1], rtol=1e-6)


def test_the_first_rejection_is_replaced_from_the_residual():
    # Row 0: min(1, .25/.75) = 1/3 of token 1; the residual is [.25, 0, .25] / .5.
    rejecting = functools.partial(step, P, Q, [1, 1, 1], [0.34, 0, 0])
    for emit, token in (((0, 0), 0), ((0, 0.49), 0), ((0, 0.51), 2), ((BELOW_ONE, BELOW_ONE), 2)):
        result = rejecting(emit=emit)
        assert (result.tokens, result.num_accepted, result.status) == ([token, -1, -1, -1], 0, 0)
        np.testing.assert_allclose(result.log_probs, [np.log(P[0][token]), 0, 0, 0], rtol=1e-6)
        np.testing.assert_allclose(result.accept_prob, [1 / 3, 1, 1], rtol=1e-6)
    assert step(P, Q, [1, 1, 1], [0.33, 0, 0]).num_accepted == 3


def test_a_rejection_in_the_middle_keeps_the_tokens_before_it():
    # Row 1: token 2 is accepted always, row 2: token 2 never; its residual is token 3 alone.
    result = step(P, Q, [0, 2, 2], [0, 0, 0])
    assert (result.tokens, result.num_accepted) == ([0, 2, 3, -1], 2)
    np.testing.assert_allclose(result.accept_prob, [1, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("drafted", [0, 1, 2])
def test_a_row_with_fewer_drafts_takes_its_bonus_after_the_last_one(drafted):
    # Tokens after the first -1 are ignored.
    tokens = [0, 1, 1][:drafted] + [-1, 1, 1][: K - drafted]
    for emit, place in (((0, 0), 0), ((BELOW_ONE, BELOW_ONE), -1)):
        result = step(P, Q, tokens, [0, 0, 0], emit=emit)
        bonus = int(np.flatnonzero(P[drafted])[place])
        assert result.tokens == [0, 1, 1][:drafted] + [bonus] + [-1] * (K - drafted)
        assert (result.num_accepted, result.status) == (drafted, 0)
        assert result.accept_prob == [1] * drafted + [0] * (K - drafted)


def test_a_deterministic_draft_is_accepted_if_and_only_if_u_is_below_p():
    # p(x) = 1/2 and u = 1/2 are exact in float32, and so are their logarithms.
    below_half = 0.5 - 2.0**-24
    halves = [[0.5, 0.5, 0, 0]] * 4
    for u, accepted in ((0, 1), (below_half, 1), (0.5, 0), (BELOW_ONE, 0)):
        result = step(halves, None, [0, -1, -1], [u, 0, 0], emit=(0, 0))
        # Rejected, the residual is p without the token.
        assert (result.tokens[:2], result.num_accepted) == (([0, 0], 1) if accepted else ([1, -1], 0))
        np.testing.assert_allclose(result.accept_prob, [0.5, 0, 0], rtol=1e-6)


def test_greedy_accepts_the_first_largest_logit_and_nothing_else():
    greedy = {**OFF, "temperature": 0.0}
    ties = [[0.1, 0.4, 0.4, 0.1]] * 4
    result = step(ties, None, [1, 1, 2], [BELOW_ONE] * 3, setting=greedy)
    assert (result.tokens, result.num_accepted) == ([1, 1, 1, -1], 2)
    assert result.log_probs == [0, 0, 0, 0]
    assert result.accept_prob == [1, 1, 0]
    assert step(ties, ties[:3], [1, 1, 2], [0] * 3, setting=greedy).tokens == [1, 1, 1, -1]


# Boundary draws


@pytest.mark.parametrize("q", [None, Q[:1] * 3])
def test_u_of_zero_never_accepts_or_emits_what_has_probability_zero(q):
    p = [[0, 0, 0.5, 0.5]] * 4
    for token in (0, 1):
        for emit in ((0, 0), (BELOW_ONE, BELOW_ONE)):
            result = step(p, q, [token, 2, 2], [0, 0, 0], emit=emit)
            assert result.num_accepted == 0
            assert result.tokens[0] in (2, 3)
            assert result.accept_prob[0] == 0


def test_a_token_that_a_filter_drops_is_never_accepted():
    result = step([[0.4, 0.3, 0.2, 0.1]] * 4, Q, [1, 0, 0], [0, 0, 0], setting={**OFF, "top_k": 1})
    assert (result.tokens, result.num_accepted, result.accept_prob[0]) == ([0, -1, -1, -1], 0, 0)


def test_u_just_below_one_accepts_a_draft_of_acceptance_one():
    result = step(P, P[:3], [0, 1, 3], [BELOW_ONE] * 3, emit=(BELOW_ONE, BELOW_ONE))
    assert (result.tokens, result.num_accepted) == ([0, 1, 3, 3], 3)


# Against the oracle, on the same uniforms


class Case(NamedTuple):
    """Arguments of the rule; p and q of each row by the oracle, None if float32 may keep other tokens than float64."""

    target: Any
    settings: list
    draft: ss.Draft
    draft_settings: list
    uniforms: Uniforms
    p: list
    q: list


def random_case(seed, *, chance=True):
    """B rows with settings, ties, masked logits and draft lengths of every kind."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(B, K + 1, V)) * 2
    logits = target[:, :K] + rng.normal(size=(B, K, V))
    target[rng.random(target.shape) < 0.1] = -np.inf
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    target[::7], logits[::7] = np.round(target[::7]), np.round(logits[::7])
    target, logits = target.astype(np.float32), logits.astype(np.float32)
    settings = [SETTINGS[i] for i in rng.integers(len(SETTINGS), size=B)]
    # Two rows in three have the same settings for draft and target.
    draft_settings = [s if i % 3 else SETTINGS[rng.integers(len(SETTINGS))] for i, s in enumerate(settings)]
    p, q = (list(map(distributions, *pair)) for pair in ((target, settings), (logits, draft_settings)))
    if chance:
        tokens = np.array([[0] * K if rows is None else [rng.choice(V, p=row) for row in rows] for rows in q])
        draft = ss.Draft(jnp.asarray(logits), jnp.asarray(logits), as_arrays(draft_settings))
    else:
        tokens = np.where(rng.random((B, K)) < 0.8, target[:, :K].argmax(-1), rng.integers(V, size=(B, K)))
        q = [np.array([oracle.one_hot(x, V) for x in row]) for row in tokens]
        draft = ss.Draft(tokens)
    length = rng.choice(K + 1, size=B, p=[0.1] * K + [1 - 0.1 * K])
    tokens[np.arange(K) >= length[:, None]] = -1
    uniforms = [rng.random((B, n), np.float32) for n in (K, 2)]
    for u in uniforms:
        u[rng.random(u.shape) < 0.05] = 0
        u[rng.random(u.shape) < 0.05] = BELOW_ONE
    draft = draft._replace(tokens=jnp.asarray(tokens, jnp.int32))
    return Case(jnp.asarray(target), settings, draft, draft_settings, Uniforms(*map(jnp.asarray, uniforms)), p, q)


def run(case):
    return numpy_verification(jit_rule(case.target, as_arrays(case.settings), case.draft, case.uniforms))


def near(setting):
    """This setting, and two that float32 may not distinguish from it."""
    top_p, min_p = setting["top_p"], setting["min_p"]
    for share in (1, 1 - 2e-6, 1 + 2e-6):
        yield {**setting, "top_p": top_p if top_p == 1 else top_p * share, "min_p": min_p * share}


def distributions(logits, setting):
    """The oracle's distributions of some rows, or None where float32 may keep one token more or fewer."""
    p, *others = ([oracle.distribution(z, **s) for z in np.asarray(logits, np.float64)] for s in near(setting))
    return np.array(p) if all(np.array_equal(np.array(p) > 0, np.array(o) > 0) for o in others) else None


def assert_agrees(result, case):
    """Asserts equal tokens, except in rows where rounding may change a decision: fewer than a tenth of them."""
    compared = 0
    for b, (p, q) in enumerate(zip(case.p, case.q, strict=True)):
        if p is None or q is None:
            continue
        tokens, u, emit = (np.asarray(a[b]) for a in (case.draft.tokens, case.uniforms.accept, case.uniforms.emit))
        emitted, n, log_probs, accept_prob = oracle.verify_token(p, q, tokens, u, *emit, TILE)
        rejects = n < K and tokens[n] >= 0
        tested = np.arange(n + rejects)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_p, log_q = (np.log(rows[tested, tokens[tested]]) for rows in (p, q))
            margin = np.abs(np.log(u[tested]) + log_q - log_p)
        weights = np.maximum(p[n] - q[n], 0) if rejects else p[n]
        if np.any(margin < 1e-5) or oracle.emission_margin(weights, *emit, TILE) < 1e-5 / weights.sum():
            continue
        compared += 1
        assert result.num_accepted[b] == n
        assert result.tokens[b].tolist() == emitted + [-1] * (K - n)
        np.testing.assert_allclose(result.log_probs[b], log_probs + [0] * (K - n), rtol=1e-5, atol=2e-5)
        np.testing.assert_allclose(result.accept_prob[b], accept_prob, rtol=3e-5)
        assert result.status[b] == 0
    assert compared > 0.9 * B


@pytest.fixture(scope="module")
def case():
    return random_case(0)


@pytest.mark.parametrize("chance", [True, False])
def test_random_rows_agree_with_the_oracle(case, chance):
    case = case if chance else random_case(1, chance=False)
    result = run(case)
    assert set(range(K + 1)) == set(result.num_accepted.tolist())
    assert_agrees(result, case)


def test_normalizers_that_are_handed_over_decide_the_same(case):
    normalizers = np.zeros((B, K), np.float32)
    for b, setting in enumerate(case.draft_settings):
        for i, z in enumerate(np.asarray(case.draft.logits[b], np.float64)):
            kept = z[oracle.distribution(z, **setting) > 0]
            normalizers[b, i] = np.logaddexp.reduce(kept / (setting["temperature"] or 1))
    handed_over = case._replace(draft=case.draft._replace(log_normalizers=jnp.asarray(normalizers)))
    result = run(handed_over)
    assert_agrees(result, handed_over)
    np.testing.assert_allclose(result.accept_prob, run(case).accept_prob, rtol=3e-5)


# Properties


def test_equal_models_accept_everything(case):
    params = as_arrays(case.settings)
    # Sample the drafts from p: the drafts of `case` come from another distribution.
    tokens = jnp.argmax(case.target[:, :K] + jax.random.gumbel(jax.random.key(0), (B, K, V)), -1).astype(jnp.int32)
    uniforms = case.uniforms._replace(accept=jnp.full((B, K), BELOW_ONE, jnp.float32))
    result = run(case._replace(draft=ss.Draft(tokens, case.target[:, :K], params), uniforms=uniforms))
    assert set(result.num_accepted.tolist()) == set(range(K + 1))
    for b, p in enumerate(case.p):
        if p is not None:
            possible = p[range(K), tokens[b]] > 0
            # A greedy row has all its probability on the first largest logit, so other drafts are rejected.
            assert result.accept_prob[b].tolist() == possible.tolist()
            assert result.num_accepted[b] == np.cumprod(possible).sum()


def test_shifted_logits_change_nothing(case):
    # In steps of 1/8, which a shift by whole numbers keeps exact.
    target, logits = (np.round(np.asarray(z) * 8) / 8 for z in (case.target, case.draft.logits))
    shift = np.random.default_rng(5).integers(-60, 60, size=(B, K + 1, 1))
    plain, shifted = (
        run(
            case._replace(
                target=jnp.asarray(target + c, jnp.float32),
                draft=case.draft._replace(logits=jnp.asarray(logits - 2 * c[:, :K], jnp.float32)),
            )
        )
        for c in (0 * shift, shift)
    )
    for name in ("tokens", "num_accepted", "status"):
        assert np.array_equal(getattr(plain, name), getattr(shifted, name))
    np.testing.assert_allclose(plain.log_probs, shifted.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("emit", [0, BELOW_ONE])
def test_nothing_outside_the_targets_support_is_emitted(case, emit):
    result = run(case._replace(uniforms=case.uniforms._replace(emit=jnp.full((B, 2), emit, jnp.float32))))
    assert np.all(result.log_probs > -np.inf)
    for p, tokens, n in zip(case.p, result.tokens, result.num_accepted, strict=True):
        if p is not None:
            assert np.all(p[range(n + 1), tokens[: n + 1]] > 0)


# Degenerate rows


BAD_ROWS = {
    "NaN": ([0.0, np.nan] + [0.0] * (V - 2), 0),
    "all NaN": ([np.nan] * V, 0),
    "+inf": ([0.0, 1.0, np.inf, np.inf] + [0.0] * (V - 4), 2),
    "NaN and +inf": ([np.nan, 1.0, np.inf] + [0.0] * (V - 3), 2),
    "nothing": ([-np.inf] * V, 0),
}
"""Logits, and the index of the first largest one, NaN left out."""


def agreeing(case):
    """The case with equal models and u = 0, so that every draft is accepted."""
    tokens = jnp.argmax(case.target[:, :K], axis=-1).astype(jnp.int32)
    uniforms = case.uniforms._replace(accept=jnp.zeros((B, K)))
    draft = ss.Draft(tokens, case.target[:, :K], as_arrays(case.settings))
    return case._replace(draft=draft, uniforms=uniforms)


def with_row(logits, row, values):
    return logits.at[:, row].set(jnp.asarray(values, logits.dtype))


@pytest.mark.parametrize("kind", BAD_ROWS)
@pytest.mark.parametrize("row", range(K + 1))
def test_a_degenerate_target_row(case, kind, row):
    values, largest = BAD_ROWS[kind]
    case = agreeing(case)
    result = run(case._replace(target=with_row(case.target, row, values)))
    # Earlier drafts are accepted; the degenerate row rejects its draft and emits a valid token.
    assert np.all(result.num_accepted == row)
    assert np.all(result.tokens[:, row] == largest)
    assert np.all(result.log_probs[:, row] == -np.inf)
    assert np.all(result.log_probs[:, :row] > -np.inf)
    assert np.all(result.status == ss.DEGENERATE_TARGET)
    assert not np.any(result.accept_prob[:, row : row + 1])


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_degenerate_draft_row_emits_from_the_target(case, kind):
    case = agreeing(case)
    result = run(case._replace(draft=case.draft._replace(logits=with_row(case.draft.logits, 1, BAD_ROWS[kind][0]))))
    assert np.all(result.num_accepted == 1)
    assert np.all(result.status == ss.DEGENERATE_DRAFT)
    assert not np.any(result.accept_prob[:, 1])
    # The token is the one that the same row emits if it has no draft there.
    none = run(case._replace(draft=case.draft._replace(tokens=case.draft.tokens.at[:, 1:].set(-1))))
    assert np.array_equal(result.tokens, none.tokens)
    assert np.array_equal(result.log_probs, none.log_probs)


def test_rows_after_the_last_token_set_no_status(case):
    clean = run(case)
    behind = (np.arange(K + 1) > clean.num_accepted[:, None])[..., None]
    spoilt_draft = case.draft._replace(logits=jnp.where(behind[:, :K], jnp.nan, case.draft.logits))
    result = run(case._replace(target=jnp.where(behind, jnp.nan, case.target), draft=spoilt_draft))
    for name in ("tokens", "num_accepted", "log_probs", "status"):
        assert np.array_equal(getattr(result, name), getattr(clean, name))


@pytest.mark.parametrize("chance", [True, False])
def test_a_draft_outside_the_vocabulary_is_replaced_from_the_target(case, chance):
    """Such a draft has no probability under p, so the row emits as if drafting had ended before it."""
    nowhere = case.draft.tokens.at[::2, 1].set(V).at[::3, 0].set(V + 1000).at[1::6, 2].set(jnp.iinfo(jnp.int32).max)
    draft = case.draft if chance else ss.Draft(case.draft.tokens)
    result = run(case._replace(draft=draft._replace(tokens=nowhere)))
    less = run(case._replace(draft=draft._replace(tokens=jnp.where(nowhere < V, nowhere, -1))))
    assert np.array_equal(result.tokens, less.tokens)
    assert np.array_equal(result.log_probs, less.log_probs)
    assert np.array_equal(result.num_accepted, less.num_accepted)
    assert not np.any(result.accept_prob[nowhere >= V])
    # Only the status differs from that of a row whose drafting ended there.
    stopped = np.take_along_axis(np.asarray(nowhere), np.minimum(result.num_accepted, K - 1)[:, None], 1)[:, 0] >= V
    stopped &= result.num_accepted < K
    assert np.any(stopped)
    assert np.array_equal(result.status, np.where(stopped, ss.DEGENERATE_DRAFT, less.status))


def test_an_empty_residual_is_flagged_and_emits_from_the_target(case):
    case = agreeing(case)._replace(settings=[OFF] * B)
    # Normalizers too small by 2 put q above p everywhere; u just below 1 then rejects every draft.
    normalizers = jax.nn.logsumexp(case.draft.logits, axis=-1) - 2
    draft = case.draft._replace(sampling=as_arrays([OFF] * B), log_normalizers=normalizers)
    case = case._replace(draft=draft, uniforms=case.uniforms._replace(accept=jnp.full((B, K), BELOW_ONE, jnp.float32)))
    result = run(case)
    assert np.all(result.num_accepted == 0)
    assert np.all(result.status == ss.EMPTY_RESIDUAL)
    less = run(case._replace(draft=draft._replace(tokens=jnp.full((B, K), -1, jnp.int32))))
    assert np.array_equal(result.tokens, less.tokens)
    assert np.all(less.status == 0)
