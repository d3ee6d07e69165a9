"""Rows of the sigmoid rule whose scores all underflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import quick_jit

import specsamp_jax as ss
from specsamp_jax._types import Filter, Uniforms
from specsamp_jax.rules import sigmoid

NONE, ALL = ss.Draft(jnp.zeros((1, 0), jnp.int32)), Filter()


@quick_jit
def verify(target, draft=NONE, target_filter=ALL, u=0.5):
    uniforms = Uniforms(jnp.full(draft.tokens.shape, u), jnp.full((1, 2), 0.5))
    return sigmoid.verify_sigmoid(target, target_filter, draft, Filter(), uniforms, alpha=0.0, beta=1.0)


def test_a_last_row_without_a_positive_score_is_degenerate():
    row = [-np.inf, -200.0, -201.0]
    result = verify(jnp.array([[row]]))
    assert result.tokens.tolist() == [[1]]
    assert result.status.tolist() == [ss.DEGENERATE_TARGET]
    np.testing.assert_allclose(result.log_probs, np.log(1 / (1 + np.exp(-1))), rtol=1e-5)
    assert oracle.sigmoid_bonus(np.array(row), 0.0, 1.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize(("scale", "status"), [(0.1, 0), (1.0, ss.DEGENERATE_TARGET)])
def test_the_scaled_logit_decides(scale, status):
    result = verify(jnp.array([[[-200.0, -900.0]]]), target_filter=Filter(scale=jnp.array([scale])))
    assert result.tokens.tolist() == [[0]]
    assert result.status.tolist() == [status]


def test_a_greedy_row_has_a_score_of_1():
    result = verify(jnp.array([[[-300.0, -200.0]]]), target_filter=Filter(jnp.ones(1), None, jnp.array([True])))
    assert result.tokens.tolist() == [[1]]
    assert result.status.tolist() == [0]


@pytest.mark.parametrize(
    ("target", "draft", "token", "status"),
    [
        # The drafted token scores 0 and is rejected; the other has a score.
        ([-300.0, 2.0], [-1.0, -2.0], 1, 0),
        # Nothing of the target has a score, whatever the draft's scores are.
        ([-300.0, -299.0], [-1.0, -2.0], 1, ss.DEGENERATE_TARGET),
        ([-300.0, -299.0], [-300.0, -299.0], 1, ss.DEGENERATE_TARGET),
        ([-300.0, -299.0], None, 1, ss.DEGENERATE_TARGET),
        # The draft's scores underflow, so that the residual is the target's row.
        ([-300.0, 2.0], [-300.0, -299.0], 1, 0),
        # The target's scores are positive; the residual underflows: the token comes from the target's.
        ([-300.0, -1.0], [-1.0, -1.0], 1, ss.EMPTY_RESIDUAL),
        # The deterministic draft is the only token with a positive score, but u rejects it.
        ([-1.0, -300.0], None, 0, ss.EMPTY_RESIDUAL),
    ],
)
def test_a_rejected_draft(target, draft, token, status):
    logits = None if draft is None else jnp.array([[draft]])
    result = verify(jnp.array([[target, [0.0, 0.0]]]), ss.Draft(jnp.array([[0]]), logits), u=1 - 2.0**-24)
    assert result.num_accepted.tolist() == [0]
    assert result.tokens.tolist() == [[token, -1]]
    assert result.status.tolist() == [status]
    if draft is not None:
        residual = oracle.sigmoid_residual(np.array(target), np.array(draft), 0.0, 1.0)
        assert residual[token] == 1


def test_a_draft_whose_score_underflows_is_accepted_by_any_positive_score():
    logits = jnp.array([[[-300.0, -299.0]]])
    result = verify(jnp.array([[[-20.0, 0.0], [0.0, 0.0]]]), ss.Draft(jnp.array([[0]]), logits), u=1 - 2.0**-24)
    assert result.num_accepted.tolist() == [1]
    assert result.accept_prob.tolist() == [[1.0]]
    assert result.status.tolist() == [0]


def test_neighbours_keep_their_bits():
    """A row without scores beside one with scores; with filters and without."""
    target = jnp.array([[[-200.0, -201.0, -205.0]], [[0.5, 1.5, -0.5]]])
    keys = jax.random.split(jax.random.key(0), 2)
    draft = ss.Draft(jnp.zeros((2, 0), jnp.int32))
    rule = jax.jit(functools.partial(ss.verify_sigmoid, alpha=0.0, beta=1.0))
    both, alone = rule(keys, target, draft), rule(keys[1:], target[1:], ss.Draft(draft.tokens[1:]))
    assert both.status.tolist() == [ss.DEGENERATE_TARGET, 0]
    assert np.asarray(both.log_probs[1:]).tobytes() == np.asarray(alone.log_probs).tobytes()
    assert both.tokens[1:].tolist() == alone.tokens.tolist()
