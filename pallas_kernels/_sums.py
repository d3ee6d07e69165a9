"""Sums of tiles of weights, many at once; and an index chosen by running sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels.types import TILE

BEFORE = 1536
"""Zeros before what running sums are made of: as far back as a sum is looked for, of up to 2,048 numbers."""

RADIX = 8
"""How much longer sums are after a round."""

EXCHANGE_BYTES = 16 * 4 * 32 * 4
"""Shared memory where warps exchange what they added up: of as many sums at once, a warp and a lane each."""


def _pile_layout(vec: int) -> Any:
    tiling = plgpu.Tiling(((1, config.THREADS * vec), (32 * vec,), (vec,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def sum_each(vectors: list[jax.Array], vec: int) -> jax.Array:
    """[n] sums of n vectors: the warps exchange them together, where each alone would wait for them."""
    shape = len(vectors), *vectors[0].shape
    number = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_pile_layout(vec))
    pile = None
    for i, x in enumerate(vectors):
        # Registers of a row of the pile are a vector's: the compiler sees through the selection.
        wide = plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (1,)), _pile_layout(vec))
        pile = wide if pile is None else jnp.where(number == i, wide, pile)
    assert pile is not None
    return jnp.sum(pile, axis=1)


def number_each(count: int, vec: int) -> jax.Array:
    """[n] numbers from 0, laid out as `sum_each` lays out its sums."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=_pile_layout(vec).reduce(1))


def store_each(ref: Any, values: jax.Array):
    """Writes [n] sums of `sum_each`."""
    # Newer JAX wants to be told that a store this small may be slow; older JAX does not ask.
    if hasattr(plgpu, "store"):
        plgpu.store(ref, values, optimized=False)
    else:
        ref[...] = values


class Sums(NamedTuple):
    """Running sums of weights, `[n]`, an element a thread and load; in shared memory too, behind `BEFORE`."""

    weights: jax.Array
    sums: jax.Array
    total: jax.Array


def running_sums(room: Any, weights: jax.Array) -> Sums:
    """Running sums of [n] weights.

    `room` is in shared memory: `BEFORE` zeros, and room for the weights at least. Each round adds to every sum those
    before it that are as long.
    """
    n = weights.shape[0]
    layout = rows.singles(n)

    def load(back):
        # Shared memory -> registers: [n], an element a thread and load.
        return plgpu.load(room.at[pl.ds(BEFORE - back, n)], layout=layout)

    room[pl.ds(BEFORE, n)] = weights
    single = sums = load(0)
    length = 1
    while length < n:
        for back in range(length, min(RADIX * length, n), length):
            sums = sums + load(back)
        room[pl.ds(BEFORE, n)] = sums
        length *= RADIX
    return Sums(single, sums, room[BEFORE + n - 1])


def first_beyond(found: Sums, wanted: jax.Array) -> jax.Array:
    """The first index of a positive weight at which the running sum exceeds `wanted`.

    Where rounding leaves none, the last positive weight; where none is positive, -1.
    """
    n = found.weights.shape[0]
    index = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=rows.singles(n))
    # Of indices behind what is wanted the first, else of the others the last: the largest of these.
    rank = jnp.where(found.sums > wanted, 2 * n - index, index)
    best = jnp.max(jnp.where(found.weights > 0, rank, -1))
    return jnp.where(best >= n, 2 * n - best, best)


class Choice(NamedTuple):
    """The number of a weight, and the sum of those before it."""

    number: jax.Array
    before: jax.Array


def first_of_few_beyond(weights: list[jax.Array], wanted: jax.Array) -> Choice:
    """The same of some numbers."""
    best, found, total, before = jnp.int32(-1), jnp.bool_(False), jnp.float32(0), jnp.float32(0)
    for i, one in enumerate(weights):
        better = (one > 0) & ~found
        best, before = jnp.where(better, i, best), jnp.where(better, total, before)
        total = total + one
        found = found | ((one > 0) & (total > wanted))
    return Choice(best, before)


def numbers_of(sums: jax.Array, vec: int) -> list[jax.Array]:
    """[n] sums of `sum_each` as numbers: every thread has all of them."""
    number = number_each(sums.shape[0], vec)
    return [jnp.sum(jnp.where(number == i, sums, 0.0)) for i in range(sums.shape[0])]


def first_of_tile_beyond(room: Any, weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The same of [TILE] weights, and a share of their sum: a part of the tile, then an element."""
    room[pl.ds(BEFORE, TILE)] = weights
    width = config.THREADS
    layout = _pile_layout(1).reduce(0)
    at = [BEFORE + i * width for i in range(TILE // width)]
    # Shared memory -> registers: [THREADS], an element a thread.
    parts = numbers_of(sum_each([plgpu.load(room.at[pl.ds(a, width)], layout=layout) for a in at], 1), 1)
    wanted = uniform * sum(parts[1:], parts[0])
    part = first_of_few_beyond(parts, wanted)
    found = running_sums(
        room, plgpu.load(room.at[pl.ds(BEFORE + part.number * width, width)], layout=rows.singles(width))
    )
    return part.number * width + first_beyond(found, wanted - part.before)


def clear_before(room: Any):
    """Writes the zeros that `running_sums` needs."""
    layout = plgpu.Layout.WG_STRIDED((BEFORE,), vec_size=4)
    room[pl.ds(0, BEFORE)] = plgpu.layout_cast(jnp.zeros((BEFORE,), jnp.float32), layout)
