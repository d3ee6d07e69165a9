"""Uniforms that a kernel makes of keys are those of `streams.uniforms`, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import random, tiles
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.streams import Purpose

BATCH, DRAWS = 3, 128


def kernel(purpose, partitionable):
    def body(keys, out):
        row = lax.axis_index("row")
        index = plgpu.broadcasted_iota(jnp.int32, (DRAWS,), 0, layout=tiles.lane_layout(DRAWS))
        out[row] = random.uniforms(random.Noise(keys, int(purpose), partitionable), row, index)

    return plgpu.kernel(
        body, out_type=jax.ShapeDtypeStruct((BATCH, DRAWS), jnp.float32), grid=(BATCH,), grid_names=("row",)
    )


def draws_of_kernel(keys, purpose):
    return kernel(purpose, bool(jax.config.jax_threefry_partitionable))(jax.random.key_data(keys))


@pytest.mark.parametrize("partitionable", [True, False])
@pytest.mark.parametrize("purpose", Purpose)
@pytest.mark.parametrize("one_per_row", [False, True])
def test_same_bits(interpreted, purpose, one_per_row, partitionable):
    key = jax.random.key(2**31 + 7)
    with jax.threefry_partitionable(partitionable):
        keys = jax.random.split(key, BATCH) if one_per_row else key
        expected = streams.uniforms(streams.row_keys(keys, BATCH), purpose, DRAWS)
        with interpreted():
            got = draws_of_kernel(keys, purpose)
    np.testing.assert_array_equal(got, expected)


def test_lowers_for_a_gpu():
    def draw(key):
        return draws_of_kernel(key, Purpose.DRAFT)

    text = jax.jit(draw).trace(jax.random.key(0)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
