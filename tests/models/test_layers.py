"""Products of a single row of 16 bits, which a CPU multiplies without a copy of the matrix."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from specsamp_jax.models import layers
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


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends multiply a row as it is")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("num_features", [1024, 1025])
def test_a_row_and_a_large_matrix_are_multiplied_in_float32(monkeypatch, dtype, num_features):
    monkeypatch.setattr(layers, "_MOST_CORES", os.cpu_count())
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((1, 1, num_features), (num_features, 4099)))

    def product(x, matrix):
        return layers.product(x, matrix, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    compiled = jax.jit(product).lower(x, matrix).compile()
    # A number of features that blocks do not divide is left to XLA's product.
    in_blocks = num_features == 1024
    assert (" while(" in compiled.as_text()) == in_blocks
    assert not in_blocks or compiled.memory_analysis().temp_size_in_bytes < matrix.nbytes / 8
    exact = np.asarray(x, np.float64)[0, 0] @ np.asarray(matrix, np.float64)
    sizes = np.abs(np.asarray(x, np.float64))[0, 0] @ np.abs(np.asarray(matrix, np.float64))
    got = compiled(x, matrix)
    assert (got.shape, got.dtype) == ((1, 1, 4099), jnp.float32)
    assert (np.abs(got[0, 0] - exact) <= 1e-6 * sizes).all()


def test_a_row_is_multiplied_by_all_of_many_cores(monkeypatch):
    monkeypatch.setattr(layers, "_MOST_CORES", 0)
    x, matrix = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1024, 4096), jnp.bfloat16)
    text = jax.jit(lambda x, w: layers.product(x, w, (((1,), (0,)), ((), ())))).lower(x, matrix).as_text()
    assert "while" not in text


@pytest.mark.parametrize("spec", [P("x"), P(None, "x")], ids=["features", "columns"])
@pytest.mark.parametrize("axes", ["manual", "explicit", "automatic"])
def test_a_row_is_multiplied_by_a_large_matrix_that_is_sharded(monkeypatch, axes, spec):
    """Not `_row_product`, whose loop would need the types of its sums; one device has the types of several."""
    monkeypatch.setattr(layers, "_LARGE", 1)
    monkeypatch.setattr(layers, "_MOST_CORES", os.cpu_count())
    rng = np.random.default_rng(0)
    x, matrix = (jnp.asarray(rng.integers(-4, 5, shape), jnp.bfloat16) for shape in ((1, 1, 16), (16, 8)))
    expected = np.asarray(x[0], np.float32) @ np.asarray(matrix, np.float32)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit if axes == "explicit" else AxisType.Auto,))
    by_rows = spec == P("x")
    specs = P(None, None, "x") if by_rows else P(), spec
    out = P() if by_rows else P(None, None, "x")

    def product(x, matrix, **options):
        return layers.product(x, matrix, (((2,), (0,)), ((), ())), **options)

    def on_a_device(x, matrix):
        return jax.lax.psum(product(x, matrix), "x") if by_rows else product(x, matrix)

    mapped = jax.shard_map(on_a_device, mesh=mesh, in_specs=specs, out_specs=out)
    placed = jax.device_put((x, matrix), tuple(NamedSharding(mesh, where) for where in specs))
    options = {"out_sharding": NamedSharding(mesh, P(None, None, None))} if axes == "explicit" and by_rows else {}
    got = jax.jit(mapped if axes == "manual" else functools.partial(product, **options))(*placed)
    np.testing.assert_array_equal(got[0], expected)
