"""Choices by running sums against NumPy. Interpreted, it is the stand-in of `scan.choose` that is tested."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import emit, scan, tiles
from pallas_kernels.config import THREADS

pytestmark = pytest.mark.slow


def choose(weights, shares, layout):
    """For each share of the sum of [n] weights the index that `scan.choose` finds, and the sum that it returns."""

    def body(weights, shares, numbers, totals, scratch):
        loaded = plgpu.load(weights, layout=layout, optimized=False)
        for i in range(len(shares)):
            numbers[i], totals[i] = scan.choose(scratch, loaded, shares[i], layout)

    count = len(shares)
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.float32)),
        scratch_types=(scan.choose_scratch(),),
        grid=(1,),
        grid_names=("sequence",),
        compiler_params=emit.COMPILER_PARAMS,
    )
    return kernel(weights, jnp.array(shares, jnp.float32))


# 2,048 tiles are those of the largest vocabulary allowed; a tile has 8, 4 or 1 weights per load.
@pytest.mark.parametrize(("n", "vec"), [(128, 1), (256, 1), (384, 1), (2048, 1), (1024, 1), (1024, 4), (1024, 8)])
@pytest.mark.parametrize("kind", ["many", "one", "none"])
def test_equals_numpy(interpreted, n, vec, kind):
    random = np.random.default_rng(n + vec)
    weights = random.integers(0, 3, n).astype(np.float32)
    weights[[0, -1]] = 0
    if kind != "many":
        weights[:] = 0
    if kind == "one":
        weights[random.integers(n)] = 3
    shares = 0.0, 0.25, 0.6, 1 - 2.0**-24, 1.0, *random.uniform(size=20).tolist()
    layout = tiles.Tile(vec, jnp.int32(0), jnp.int32(0), jnp.int32(0)).layout if n == 1024 else tiles.lane_layout(n)
    with interpreted():
        numbers, totals = jax.block_until_ready(choose(jnp.asarray(weights), shares, layout))
    # Sums of small whole numbers are exact.
    expected = np.cumsum(weights)
    last = np.flatnonzero(weights)[-1] if kind != "none" else -1
    beyond = [np.flatnonzero(expected > np.float32(share) * expected[-1]) for share in shares]
    assert numbers.tolist() == [places[0] if len(places) else last for places in beyond]
    assert totals.tolist() == [expected[-1]] * len(shares)
    assert n % (THREADS * vec) == 0
