"""A vocabulary of 1,000,003: 976 tiles of 1,024 and one of 579 tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import specsamp_jax as ss
from specsamp_jax._types import TILE, Uniforms
from specsamp_jax.rules.token import verify_token
from specsamp_jax.sampling import gumbel, streams
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


FILTERS = {"temperature": 0.8, "top_k": 300_000, "top_p": 0.9, "min_p": 1e-6}


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{}, FILTERS], ids=["off", "on"])
def test_sample_agrees_with_the_oracle(rows, setting):
    logits, num_compared = rows[0][:, 0], 0
    sampling = ss.SamplingParams(*(np.full(B, value) for value in ss.SamplingParams(**setting)))
    p = [oracle.distribution(row.astype(float), **setting) for row in logits]
    run = jax.jit(ss.sample)
    for seed in range(8):
        keys = jax.random.split(jax.random.key(seed), B)
        uniforms = np.asarray(streams.uniforms(keys, streams.Purpose.DRAFT, 2), float)
        tokens, log_normalizers = run(keys, logits, sampling)
        for b in range(B):
            assert p[b][tokens[b]] > 0
            scaled = logits[b, tokens[b]] / setting.get("temperature", 1.0)
            np.testing.assert_allclose(scaled - log_normalizers[b], np.log(p[b][tokens[b]]), atol=1e-4)
            if oracle.emission_margin(p[b], *uniforms[b], TILE) > 1e-5:
                num_compared += 1
                assert tokens[b] == oracle.sample_two_level(p[b], *uniforms[b], TILE)
    assert num_compared > 4 * B


@functools.partial(jax.jit, static_argnums=1)
def all_noise(keys, num_rows):
    """The noise of all tokens; the last tile is as wide as the others and begins inside the one before it."""
    keys = gumbel.noise_keys(keys, jnp.full(B, 7), num_rows)
    last = -(-V // TILE) - 1
    tiles = jax.lax.map(lambda tile: gumbel.noise(keys, tile, TILE), jnp.arange(last + 1))
    whole = jnp.moveaxis(tiles[:-1], 0, -2).reshape(B, num_rows, last * TILE)
    return jnp.concatenate([whole, tiles[-1, ..., last * TILE - V :]], -1)


def is_clear(p, noise):
    """Whether rounding cannot change which token is the largest."""
    with np.errstate(divide="ignore"):
        first, second = np.sort(np.log(p) + noise)[[-1, -2]]
    return first - second > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("setting", [{}, FILTERS], ids=["off", "on"])
def test_coupled_samples_agree_with_the_oracle(rows, setting):
    target, draft = rows
    sampling = ss.SamplingParams(*(np.full(B, value) for value in ss.SamplingParams(**setting)))
    p = [[oracle.distribution(row.astype(float), **setting) for row in pair] for pair in target]
    verify, sample = jax.jit(ss.verify_coupled), jax.jit(ss.sample_coupled)
    texts = []
    for seed in range(3):
        keys = jax.random.split(jax.random.key(seed), B)
        noise = np.asarray(all_noise(keys, 2), float)
        samples = [int(np.argmax(np.log(np.maximum(p[b][0], 1e-300)) + noise[b, 0])) for b in range(B)]
        clear = [all(is_clear(*row) for row in zip(p[b], noise[b], strict=True)) for b in range(B)]
        assert sum(clear) >= B - 1
        drawn, _ = sample(keys, target[:, 0], sampling, positions=7)
        assert [t for t, c in zip(drawn.tolist(), clear, strict=True) if c] == [
            t for t, c in zip(samples, clear, strict=True) if c
        ]
        # Drafts that are the target's samples, and drafts that are others.
        for tokens in (np.array(samples)[:, None], np.array([[0], [V - 1], [V - 1], [V // 2]])):
            result = verify(keys, target, ss.Draft(tokens, draft, sampling), sampling, positions=7)
            for b in range(B):
                if clear[b]:
                    text = oracle.coupled_text(np.array(p[b]), noise[b], tokens[b].tolist())
                    assert result.tokens[b, : len(text)].tolist() == text
                    assert result.num_accepted[b] == len(text) - 1
                    log_p = [np.log(p[b][i][token]) for i, token in enumerate(text)]
                    np.testing.assert_allclose(result.log_probs[b, : len(text)], log_p, atol=1e-4)
                    texts.append(text)
    assert {len(text) for text in texts} == {1, 2}
