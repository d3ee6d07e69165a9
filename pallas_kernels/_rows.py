"""What is done to one row of logits inside a kernel: probabilities, tiles, and the search for an index."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config

LOG2_E = 1 / math.log(2)
"""exp(x) is exp2(x * LOG2_E), and exp2 is one instruction."""

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where a running maximum starts: a number, so that minus infinity less this is no NaN."""

NOWHERE = 2**31 - 1
"""An index above all others."""


BEFORE = 1024
"""Zeros before what running sums are made of, three quarters of the largest power of 4 below a tile at least."""

EXCHANGE_BYTES = 16 * 4 * 32 * 4
"""Shared memory where warps exchange what they added up: of as many sums at once, a warp and a lane each."""


class Row(NamedTuple):
    """What makes a distribution of a row: p(x) = exp((x - offset) * scale - log_sum) where x >= cutoff."""

    offset: jax.Array
    log_sum: jax.Array
    scale: jax.Array | None
    cutoff: jax.Array | None


def prob(x: jax.Array, row: Row) -> jax.Array:
    """P of a vector of logits, in float32."""
    # One subtraction, one multiplication and addition, one exponential.
    x = x.astype(jnp.float32)
    rate = LOG2_E if row.scale is None else row.scale * LOG2_E
    p = jnp.exp2((x - row.offset) * rate - row.log_sum * LOG2_E)
    return p if row.cutoff is None else jnp.where(x >= row.cutoff, p, 0.0)


class Tile(NamedTuple):
    """Where a tile of a row is read: at vector `first` of the row, moved back where arrays end.

    Attributes:
      vec: Elements of a vector.
      first: The vector.
      in_shared: Whether it is to be written to shared memory, which wants another name for the same layout.
      low: The first place in the row that belongs to the tile.
      high: The first behind it.
    """

    vec: int
    first: jax.Array
    in_shared: bool
    low: jax.Array
    high: jax.Array

    @property
    def layout(self) -> Any:
        """Of its elements: vectors of a thread."""
        if self.in_shared:
            return plgpu.Layout.WG_STRIDED((config.TILE,), vec_size=self.vec)
        vec = self.vec
        tiling = plgpu.Tiling(((config.THREADS * vec,), (32 * vec,), (vec,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def place(self) -> jax.Array:
        """The places in the row."""
        return plgpu.broadcasted_iota(jnp.int32, (config.TILE,), 0, layout=self.layout) + self.first * self.vec


def tile_at(tile: jax.Array, vocab_size: int, places: list[tuple[Any, jax.Array]], in_shared: bool) -> Tile:
    """The tile of that number in every row of `places`, pairs of an array of rows and a row's number.

    All of them are read at the same places of their rows. A tile before the first or past the last is empty.
    """
    vec = min(config.row_vector_size(ref.dtype, vocab_size) for ref, _ in places)
    row_vectors, tile_vectors = vocab_size // vec, config.TILE // vec
    first = jnp.clip(tile * tile_vectors, 0, row_vectors - 1)
    for ref, row in places:
        first = jnp.minimum(first, ref.shape[0] // vec - tile_vectors - row * row_vectors)
    high = jnp.minimum((tile + 1) * config.TILE, vocab_size)
    return Tile(vec, first, in_shared, tile * config.TILE, high)


def load_tile(ref: Any, vocab_size: int, row: jax.Array, tile: Tile) -> jax.Array:
    """[TILE] logits of a row."""
    # HBM or L2 -> registers: [TILE], vec elements a thread and load.
    at = pl.ds((row * (vocab_size // tile.vec) + tile.first) * tile.vec, config.TILE)
    return plgpu.load(ref.at[at], layout=tile.layout, optimized=False)


def only_inside(values: jax.Array, tile: Tile, nothing: float = 0.0) -> jax.Array:
    """[TILE] values, and `nothing` where the tile does not reach."""
    place = tile.place()
    other = plgpu.layout_cast(jnp.full(values.shape, nothing, values.dtype), tile.layout)
    return jnp.where((place >= tile.low) & (place < tile.high), values, other)


def _pile_layout(vec: int) -> Any:
    tiling = plgpu.Tiling(((1, config.THREADS * vec), (32 * vec,), (vec,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def sum_each(vectors: list[jax.Array], vec: int) -> jax.Array:
    """[n] sums of n vectors of tiles: the warps exchange them together, where each alone would wait for them."""
    shape = len(vectors), config.TILE
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

    `room` is in shared memory: `BEFORE` zeros, and room for the weights at least. Each round adds to every sum the
    three before it that are as long.
    """
    n = weights.shape[0]
    layout = plgpu.Layout.WG_STRIDED((n,), vec_size=1)

    def load(back):
        # Shared memory -> registers: [n], an element a thread and load.
        return plgpu.load(room.at[pl.ds(BEFORE - back, n)], layout=layout)

    room[pl.ds(BEFORE, n)] = weights
    single = sums = load(0)
    length = 1
    while length < n:
        for back in range(length, min(4 * length, n), length):
            sums = sums + load(back)
        room[pl.ds(BEFORE, n)] = sums
        length *= 4
    return Sums(single, sums, room[BEFORE + n - 1])


def first_beyond(found: Sums, wanted: jax.Array) -> jax.Array:
    """The first index of a positive weight at which the running sum exceeds `wanted`.

    Where rounding leaves none, the last positive weight; where none is positive, -1.
    """
    n = found.weights.shape[0]
    index = plgpu.broadcasted_iota(jnp.int32, (n,), 0, layout=plgpu.Layout.WG_STRIDED((n,), vec_size=1))
    # Of indices behind what is wanted the first, else of the others the last: the largest of these.
    rank = jnp.where(found.sums > wanted, 2 * n - index, index)
    best = jnp.max(jnp.where(found.weights > 0, rank, -1))
    return jnp.where(best >= n, 2 * n - best, best)


def first_of_few_beyond(weights: jax.Array, vec: int, wanted: jax.Array) -> jax.Array:
    """The same of [n] sums of `sum_each`, which every thread has all of."""
    n = weights.shape[0]
    number = number_each(n, vec)
    best, found, total = jnp.int32(-1), jnp.bool_(False), jnp.float32(0)
    for i in range(n):
        one = jnp.sum(jnp.where(number == i, weights, 0.0))
        total = total + one
        best = jnp.where((one > 0) & ~found, i, best)
        found = found | ((one > 0) & (total > wanted))
    return best


def clear_before(room: Any):
    """Writes the zeros that `search` needs."""
    layout = plgpu.Layout.WG_STRIDED((BEFORE,), vec_size=4)
    room[pl.ds(0, BEFORE)] = plgpu.layout_cast(jnp.zeros((BEFORE,), jnp.float32), layout)
