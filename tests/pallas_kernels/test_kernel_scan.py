"""Running sums in shared memory, and what is chosen by them, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import emit, scan
from pallas_kernels.tiles import lane_layout

pytestmark = pytest.mark.slow


def search(weights, shares):
    """Running sums of [n] weights, and the first index beyond each share of their sum."""
    n = weights.shape[0]

    def body(weights, shares, sums, indices, scratch):
        scan.clear_prefix(scratch)
        running = scan.running_sums(scratch, plgpu.load(weights, layout=lane_layout(n)))
        sums[...] = running.sums
        for i in range(len(shares)):
            indices[i] = scan.first_beyond(running, shares[i] * running.total)

    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((len(shares),), jnp.int32)),
        scratch_types=(scan.search_scratch(n),),
        grid=(1,),
        grid_names=("sequence",),
        compiler_params=emit.COMPILER_PARAMS,
    )
    return kernel(weights, jnp.array(shares, jnp.float32))


# 2,048 tiles are those of the largest vocabulary allowed.
@pytest.mark.parametrize("n", [128, 256, 384, 1024, 2048])
def test_equals_numpy(interpreted, n):
    weights = np.random.default_rng(n).integers(0, 3, n).astype(np.float32)
    weights[[0, -1]] = 0
    shares = 0.0, 0.25, 0.6, 1 - 2.0**-24, 1.0
    with interpreted():
        sums, found = jax.block_until_ready(search(jnp.asarray(weights), shares))
    # Sums of small whole numbers are exact.
    expected = np.cumsum(weights)
    np.testing.assert_array_equal(sums, expected)
    last = np.flatnonzero(weights)[-1]
    beyond = [np.flatnonzero(expected > np.float32(share) * expected[-1]) for share in shares]
    assert found.tolist() == [places[0] if len(places) else last for places in beyond]
