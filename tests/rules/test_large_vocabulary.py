"""A vocabulary of 1,000,003: 976 tiles of 1,024 and one of 579 tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import specsamp_jax as ss
from specsamp_jax._types import TILE, Uniforms
from specsamp_jax.rules.token import verify_token
from specsamp_jax.sampling.filters import Filter

V, B = 1_000_003, 4
BELOW_ONE = 1 - 2.0**-24


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(B, 2, V)).astype(np.float32)
    # A row whose probable tokens are the last ones, and one where only the very last is possible.
    target[1, :, -5:] += 25
    target[2, :, :-1] = -np.inf
    return target, (target[:, :1] + rng.normal(size=(B, 1, V))).astype(np.float32)


@jax.jit
def rule(target, tokens, draft, uniforms):
    return verify_token(target, Filter(), ss.Draft(tokens, draft), Filter(), uniforms)


def distributions(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.77, BELOW_ONE])
def test_the_token_rule_agrees_with_the_oracle(rows, u):
    target, draft = rows
    tokens = np.array([[17], [V - 2], [V - 1], [V]], np.int32)
    uniforms = Uniforms(jnp.full((B, 1), u, jnp.float32), jnp.full((B, 2), u, jnp.float32))
    result = rule(target, tokens, draft, uniforms)
    p, q = distributions(target), distributions(draft)
    for b in range(B):
        possible = tokens[b, 0] < V
        accept_prob = min(1, p[b, 0, tokens[b, 0]] / q[b, 0, tokens[b, 0]]) if possible else 0
        np.testing.assert_allclose(result.accept_prob[b, 0], accept_prob, rtol=1e-5)
        accepted = u < accept_prob
        assert result.num_accepted[b] == accepted
        weights = p[b, 1] if accepted else np.maximum(p[b, 0] - q[b, 0] * possible, 0)
        last = int(result.tokens[b, int(accepted)])
        assert weights[last] > 0
        # Float32 sums of a million weights give the oracle's token, unless the uniform is close to a boundary.
        if 0 < u < BELOW_ONE and oracle.emission_margin(weights, u, u, TILE) > 1e-5:
            assert last == oracle.sample_two_level(weights, u, u, TILE)
        np.testing.assert_allclose(result.log_probs[b, int(accepted)], np.log(p[b, int(accepted), last]), rtol=1e-5)
    assert result.status.tolist() == [0, 0, 0, ss.DEGENERATE_DRAFT]


def test_samples_are_tokens_and_normalizers_are_those_of_the_row(rows):
    target = rows[0][:, 0]
    tokens, log_normalizers = jax.jit(ss.sample)(jax.random.key(0), target)
    assert tokens.tolist()[2] == V - 1
    assert tokens.tolist()[1] >= V - 5
    assert (tokens < V).all()
    assert (target[range(B), tokens] > -np.inf).all()
    expected = np.log(np.exp(target.astype(np.float64)).sum(-1))
    np.testing.assert_allclose(log_normalizers, expected, rtol=1e-6)
    greedy = jax.jit(ss.sample)(jax.random.key(0), target, ss.SamplingParams(jnp.zeros(B)))[0]
    assert greedy.tolist() == target.argmax(-1).tolist()
