"""Operations of a compiled decoder: XLA keeps some kilobytes of memory for each as long as the program lives."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_llama import SIZES

from specsamp_jax.models import Llama, LlamaConfig


def compiled(num_layers):
    """The text of the optimised program of a Llama."""
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": num_layers})
    graph, weights = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    cache = jax.eval_shape(lambda: nnx.merge(graph, weights).init_cache_fn(1, 16))
    tokens = jax.ShapeDtypeStruct((1, 3), jnp.int32)
    run = jax.jit(lambda weights, tokens, cache: nnx.merge(graph, weights)(tokens, tokens, cache))
    return run.lower(weights, tokens, cache).compile().as_text()


@pytest.fixture(scope="module")
def texts():
    return [compiled(num_layers) for num_layers in (2, 3)]


def test_angles_and_masks_are_computed_once_for_all_layers(texts):
    cosines = [text.count(" cosine(") for text in texts]
    assert cosines[0] == cosines[1] > 0
