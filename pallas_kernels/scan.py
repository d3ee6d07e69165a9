"""Joint sums of several vectors, running sums, and the first index at which a running sum exceeds a bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.config import THREADS, to_lanes
from pallas_kernels.tiles import lane_layout
from pallas_kernels.types import TILE

PREFIX = 1536
"""Zeros before the numbers of a running sum: the largest distance that a round reads back, for up to 2,048 numbers."""

RADIX = 8
"""Factor by which each round increases the length of the partial sums."""

LEAST_WEIGHT = 2.0**-80
"""Weight of a tile or chunk, relative to the largest logit of its row, that counts as 0: no uniform but 0 reaches it,
and its probabilities may round to zeros."""

HELD = 8
"""Numbers at the end of the scratch for `hold`."""

EXCHANGE_BYTES = 16 * 4 * 32 * 4
"""Bytes of shared memory in which warps exchange partial sums: 16 float32 sums, each from 4 warps of 32 lanes."""


def stack_layout(vec: int) -> Any:
    """Layout of n stacked vectors, `[n, m]`, of which each thread holds `vec` adjacent elements per load."""
    tiling = plgpu.Tiling(((1, THREADS * vec), (32 * vec,), (vec,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def sum_vectors(vectors: list[jax.Array], vec: int) -> jax.Array:
    """Sums of n vectors, `[n]`, with one exchange between warps for all of them instead of one barrier per sum."""
    shape = len(vectors), *vectors[0].shape
    number = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=stack_layout(vec))
    stack = None
    for i, x in enumerate(vectors):
        # A row of the stack has the registers of its vector: the compiler removes the selection.
        wide = plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (1,)), stack_layout(vec))
        stack = wide if stack is None else jnp.where(number == i, wide, stack)
    assert stack is not None
    return jnp.sum(stack, axis=1)


def vector_numbers(count: int, vec: int) -> jax.Array:
    """The numbers 0 to n - 1 in the layout of the result of `sum_vectors`."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=stack_layout(vec).reduce(1))


def store_sums(ref: Any, sums: jax.Array):
    """Stores the `[n]` sums that `sum_vectors` returns."""
    # Newer JAX refuses so small a store unless `optimized=False`; JAX 0.11.2 has no `plgpu.store`.
    if hasattr(plgpu, "store"):
        plgpu.store(ref, sums, optimized=False)
    else:
        ref[...] = sums


def to_scalars(sums: jax.Array, vec: int) -> list[jax.Array]:
    """The `[n]` sums that `sum_vectors` returns as n scalars, which every thread holds."""
    number = vector_numbers(sums.shape[0], vec)
    return [jnp.sum(jnp.where(number == i, sums, 0.0)) for i in range(sums.shape[0])]


class RunningSums(NamedTuple):
    """`[n]` weights, their running sums and total; the scratch holds the running sums too, from `PREFIX` on."""

    weights: jax.Array
    sums: jax.Array
    total: jax.Array


def search_scratch(count: int) -> Any:
    """Shared memory for `running_sums` of `count` numbers, or of a tile if that is longer, and for `hold`."""
    return plgpu.SMEM((PREFIX + max(TILE, to_lanes(count)) + HELD,), jnp.float32)


def hold(scratch: Any, values: list[jax.Array]) -> list[jax.Array]:
    """Returns at most `HELD` scalars, computed before this line, where the compiler would compute them at their use."""
    start = scratch.shape[0] - HELD
    for i, value in enumerate(values):
        # Registers -> shared memory: one float32. A store is not moved over the barriers that follow.
        scratch[start + i] = value
    return [scratch[start + i] for i in range(len(values))]


def clear_prefix(scratch: Any):
    """Writes the zeros that `running_sums` reads before its numbers."""
    layout = plgpu.Layout.WG_STRIDED((PREFIX,), vec_size=4)
    scratch[pl.ds(0, PREFIX)] = plgpu.layout_cast(jnp.zeros((PREFIX,), jnp.float32), layout)


def running_sums(scratch: Any, weights: jax.Array) -> RunningSums:
    """Running sums of `[n]` weights.

    Each round adds to every sum of `length` numbers the seven preceding sums of that length. `scratch` is from
    `search_scratch`, its prefix cleared.
    """
    n = weights.shape[0]
    layout = lane_layout(n)

    def load(back):
        # Shared memory -> registers: [n], one element per thread and load.
        return plgpu.load(scratch.at[pl.ds(PREFIX - back, n)], layout=layout)

    scratch[pl.ds(PREFIX, n)] = weights
    by_lane = sums = load(0)
    length = 1
    while length < n:
        for back in range(length, min(RADIX * length, n), length):
            sums = sums + load(back)
        scratch[pl.ds(PREFIX, n)] = sums
        length *= RADIX
    return RunningSums(by_lane, sums, scratch[PREFIX + n - 1])


def first_beyond(running: RunningSums, bound: jax.Array) -> jax.Array:
    """The first index of a positive weight at which the running sum exceeds `bound`.

    If rounding leaves no such index, the last positive weight; if no weight is positive, -1.
    """
    n = running.weights.shape[0]
    index = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=lane_layout(n))
    # The largest rank is the first index beyond the bound, else the last index before it.
    rank = jnp.where(running.sums > bound, 2 * n - index, index)
    best = jnp.max(jnp.where(running.weights > 0, rank, -1))
    return jnp.where(best >= n, 2 * n - best, best)


class Choice(NamedTuple):
    """Index of a chosen weight, and the sum of the weights before it."""

    number: jax.Array
    before: jax.Array


def first_scalar_beyond(weights: list[jax.Array], bound: jax.Array) -> Choice:
    """Like `first_beyond`, for a few scalars."""
    best, found, total, before = jnp.int32(-1), jnp.bool_(False), jnp.float32(0), jnp.float32(0)
    for i, weight in enumerate(weights):
        better = (weight > 0) & ~found
        best, before = jnp.where(better, i, best), jnp.where(better, total, before)
        total = total + weight
        found = found | ((weight > 0) & (total > bound))
    return Choice(best, before)


def first_in_tile_beyond(scratch: Any, weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Like `first_beyond`, for `[TILE]` weights and a bound of `uniform` times their sum, in two levels."""
    scratch[pl.ds(PREFIX, TILE)] = weights
    layout = stack_layout(1).reduce(0)
    starts = [PREFIX + i * THREADS for i in range(TILE // THREADS)]
    # Shared memory -> registers: [THREADS] per part, one element per thread.
    parts = [plgpu.load(scratch.at[pl.ds(start, THREADS)], layout=layout) for start in starts]
    sums = to_scalars(sum_vectors(parts, 1), 1)
    bound = uniform * sum(sums[1:], sums[0])
    part = first_scalar_beyond(sums, bound)
    weights = plgpu.load(scratch.at[pl.ds(PREFIX + part.number * THREADS, THREADS)], layout=lane_layout(THREADS))
    return part.number * THREADS + first_beyond(running_sums(scratch, weights), bound - part.before)
