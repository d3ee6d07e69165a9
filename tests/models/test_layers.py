"""Products of a single row of 16 bits, which a CPU multiplies without a copy of the matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from specsamp_jax.models.layers import Vocabulary, linear

WIDTH, SIZE = 256, 1024
DTYPES = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends multiply a row as it is")
@pytest.mark.parametrize("layer", ["linear", "head"])
def test_a_row_is_multiplied_without_a_float32_copy_of_the_matrix(layer):
    if layer == "linear":
        fn = linear(WIDTH, SIZE, stddev=1.0, rngs=nnx.Rngs(0), **DTYPES)
    else:
        fn = Vocabulary(SIZE, WIDTH, tied=True, stddev=1.0, rngs=nnx.Rngs(0), **DTYPES).logits
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, WIDTH)), jnp.bfloat16)
    graph, state = nnx.split(fn.__self__ if layer == "head" else fn)

    def apply(state, x):
        module = nnx.merge(graph, state)
        return module.logits(x) if layer == "head" else module(x)

    compiled = jax.jit(apply).lower(state, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < WIDTH * SIZE
    pair = jax.jit(apply)(state, jnp.concatenate([x, -x]))[:1]
    got = compiled(state, x)
    assert got.shape == (1, 1, SIZE)
    assert got.dtype == pair.dtype
    np.testing.assert_allclose(got.astype(jnp.float32), pair.astype(jnp.float32), rtol=1e-2, atol=1e-2)
