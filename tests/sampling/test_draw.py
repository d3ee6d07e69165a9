"""The bounds of the vocabulary: no token beyond it is drawn, and no id beyond it has a logit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import quick_jit

import specsamp_jax as ss
from pallas_kernels import mosaic
from specsamp_jax._types import TILE
from specsamp_jax.sampling.dispatch import for_this_machine
from specsamp_jax.sampling.draw import sample_weights, tile_sums
from specsamp_jax.sampling.filters import Filter
from specsamp_jax.sampling.rows import log_prob, target_rows, token_logits

BELOW_ONE = 1 - 2.0**-24
log_probs, logits_of = quick_jit(log_prob), quick_jit(token_logits)


@quick_jit
def draw(weights, uniforms):
    return sample_weights(weights, tile_sums(weights), uniforms)


@pytest.mark.parametrize("vocab_size", [1, 3, TILE - 1, TILE, TILE + 1, 2 * TILE + 5])
def test_uniforms_just_below_1_draw_the_last_token(vocab_size):
    weights = jnp.ones((2, vocab_size))
    token = draw(weights, jnp.full((2, 2), BELOW_ONE))
    assert token.tolist() == [vocab_size - 1] * 2


def test_no_token_beyond_the_vocabulary_is_drawn_from_a_short_last_tile():
    weights = jnp.zeros((1000, TILE + 3)).at[:, TILE:].set(jnp.array([1.0, 2.0, 3.0]))
    within = jnp.linspace(0, BELOW_ONE, 1000)
    token = draw(weights, jnp.stack([jnp.full(1000, BELOW_ONE), within], axis=1))
    expected = TILE + np.searchsorted([1 / 6, 1 / 2], np.asarray(within), side="right")
    # The bounds themselves may fall to either side.
    assert np.mean(token != expected) <= 2e-3
    assert set(token.tolist()) == {TILE, TILE + 1, TILE + 2}


@pytest.mark.parametrize("token", [-(2**31), -6, -5, -1, 5, 6, 2**31 - 1])
@pytest.mark.parametrize("cutoff", [None, 0.0])
def test_an_id_outside_the_vocabulary_has_no_logit(token, cutoff):
    filter = Filter() if cutoff is None else Filter(cutoff=jnp.full((2, 2), cutoff))
    rows = target_rows(jnp.arange(20.0).reshape(2, 2, 5), filter)
    tokens = jnp.full((2, 2), token, jnp.int32)
    assert np.all(logits_of(rows, tokens) == -np.inf)
    assert np.all(log_probs(rows, tokens) == -np.inf)


@pytest.mark.kernels
@pytest.mark.skipif(mosaic.why_missing() is not None, reason="this jaxlib is without Mosaic GPU")
def test_kernels_are_traced_for_other_machines_alone():
    def program():
        return str(jax.make_jaxpr(lambda logits: ss.sample(jax.random.key(0), logits))(jnp.zeros((1, 2 * TILE))))

    assert "run_scoped" in program()  # a primitive of Pallas
    with for_this_machine(True):
        assert ("run_scoped" in program()) == (jax.default_backend() == "gpu")
