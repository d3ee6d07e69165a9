"""Choices by running sums against NumPy. Interpreted, it is the stand-in of `scan.choose` that is tested."""

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import emit, scan, tiles
from pallas_kernels.config import THREADS, WARP

pytestmark = pytest.mark.slow


def in_one_block(body, out_type, scratch):
    """A kernel of one block."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(scratch,),
        grid=(1,),
        grid_names=("sequence",),
        compiler_params=emit.COMPILER_PARAMS,
    )


def choices(count):
    """Types of the numbers and totals of `count` choices."""
    return jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct((count,), jnp.float32)


def choose(weights, shares, layout):
    """For each share of the sum of [n] weights the index that `scan.choose` finds, and the sum that it returns."""

    def body(weights, shares, numbers, totals, scratch):
        loaded = plgpu.load(weights, layout=layout, optimized=False)
        for i in range(len(shares)):
            numbers[i], totals[i] = scan.choose(scratch, loaded, shares[i], layout)

    count = len(shares)
    kernel = in_one_block(body, choices(count), scan.choose_scratch())
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


@pytest.mark.parametrize(("n", "vec", "count"), [(256, 1, 8), (1024, 8, 4)])
def test_several_choices_equal_single_ones(interpreted, n, vec, count):
    random = np.random.default_rng(n)
    weights = random.integers(0, 3, (count, n)).astype(np.float32)
    weights[1] = 0
    shares = random.uniform(size=count).astype(np.float32)
    layout = tiles.Tile(vec, jnp.int32(0), jnp.int32(0), jnp.int32(0)).layout if n == 1024 else tiles.lane_layout(n)

    def body(weights, shares, numbers, totals, scratch):
        loaded = [plgpu.load(weights.at[i], layout=layout, optimized=False) for i in range(count)]
        for i, choice in enumerate(scan.choose_each(scratch, loaded, [shares[i] for i in range(count)], layout)):
            numbers[i], totals[i] = choice

    kernel = in_one_block(body, choices(count), scan.choose_scratch())
    with interpreted():
        numbers, totals = jax.block_until_ready(kernel(jnp.asarray(weights), jnp.asarray(shares)))
        single = [
            jax.block_until_ready(choose(jnp.asarray(w), [u], layout)) for w, u in zip(weights, shares, strict=True)
        ]
    assert numbers.tolist() == [int(number[0]) for number, _ in single]
    assert totals.tolist() == [float(total[0]) for _, total in single]


@pytest.mark.parametrize("count", [1, 4, 5, 8])
@pytest.mark.parametrize("vec", [4, 8])
def test_sums_of_tiles_equal_numpy(interpreted, vec, count):
    width = THREADS * vec
    weights = np.random.default_rng(count).integers(0, 9, (count, width)).astype(np.float32)
    layout = plgpu.Layout.WG_STRIDED((width,), vec_size=vec)

    def body(weights, totals, tops, total, scratch):
        loaded = [plgpu.load(weights.at[i], layout=layout) for i in range(count)]
        totals[...] = plgpu.layout_cast(jnp.full((THREADS,), -1.0), tiles.lane_layout(THREADS))
        part = pl.ds(8, count)
        total[0] = scan.sum_tiles(scratch, loaded, jnp.float32(3), totals.at[part], tops.at[part], layout)

    floats = jax.ShapeDtypeStruct((THREADS,), jnp.float32)
    out_type = floats, floats, jax.ShapeDtypeStruct((1,), jnp.float32)
    kernel = in_one_block(body, out_type, scan.sum_tiles_scratch())
    with interpreted():
        totals, tops, total = jax.block_until_ready(kernel(jnp.asarray(weights)))
    # Sums of small whole numbers are exact.
    expected = np.full(THREADS, -1.0)
    expected[8 : 8 + count] = weights.sum(1)
    assert totals.tolist() == expected.tolist()
    assert tops[8 : 8 + count].tolist() == [3.0] * count
    assert total.tolist() == [weights.sum()]


@pytest.mark.skipif(not cases.ON_GPU, reason="the interpreter has a stand-in")
def test_least_of_a_warp():
    numbers = np.random.default_rng(0).integers(-99, 99, WARP).astype(np.int32)

    def body(numbers, least):
        least[0] = scan.warp_min(plgpu.load(numbers, layout=tiles.lane_layout(WARP), optimized=False))

    kernel = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct((1,), jnp.int32), grid=(1,), grid_names=("sequence",))
    assert kernel(jnp.asarray(numbers)).tolist() == [numbers.min()]
