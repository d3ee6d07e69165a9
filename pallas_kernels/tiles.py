"""Aligned and masked loads of rows of logits, which are contiguous in a flat array.

A row is read in chunks when it is reduced (16 bytes per load for every V), and in tiles when it emits a token.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config
from pallas_kernels.config import THREADS, WARP
from pallas_kernels.types import TILE


def lane_layout(count: int) -> Any:
    """Layout of a vector with one element per thread and load; of at most 32 elements every warp holds a copy."""
    if count <= WARP:
        warps, copies = THREADS // WARP, WARP // count
        lanes = (plgpu.Replicated(copies), -2) if copies > 1 else (-2,)
        tiling = plgpu.Tiling(((count,), (1,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(warps),), lane_dims=lanes, vector_dim=-1)
    return plgpu.Layout.WG_STRIDED((count,), vec_size=1)


def chunk_layout(cut: config.Chunks) -> Any:
    """Layout of the vectors of a chunk."""
    return plgpu.Layout.WG_STRIDED((cut.lanes,), vec_size=cut.vec)


def lane_index(count: int) -> jax.Array:
    """The integers 0 to n - 1 in `lane_layout`."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=lane_layout(count))


def load_lanes(ref: Any, index: tuple[Any, ...]) -> jax.Array:
    """Loads the last axis of a small array at `index`, in `lane_layout`."""
    # L2 -> registers: [n], one element per thread and load.
    return plgpu.load(ref.at[index], layout=lane_layout(ref.shape[-1]), optimized=False)


def load_warp(ref: Any, index: tuple[Any, ...], number: int) -> jax.Array:
    """Loads elements `WARP * number` to `WARP * number + WARP - 1` of the last axis; every warp holds a copy."""
    # L2 -> registers: [WARP].
    elements = pl.ds(WARP * number, WARP)
    return plgpu.load(ref.at[(*index, elements)], layout=lane_layout(WARP), optimized=False)


def load_first_lanes(ref: Any, index: tuple[Any, ...], count: int, fill: float | int) -> jax.Array:
    """Like `load_lanes`, with `fill` after the first `count` elements."""
    lane = lane_index(ref.shape[-1])
    return jnp.where(lane < count, load_lanes(ref, index), fill)


def store(ref: Any, vector: jax.Array):
    """Stores a vector of any length and layout."""
    # Newer JAX refuses short vectors unless `optimized=False`; JAX 0.11.2 has no `plgpu.store`.
    if hasattr(plgpu, "store"):
        plgpu.store(ref, vector, optimized=False)
    else:
        ref[...] = vector


class Tile(NamedTuple):
    """One tile of a row, and the location of the `TILE` elements that are loaded for it.

    Attributes:
      vec: Elements per load.
      first: Index in the row of the first vector loaded; smaller than the tile's if its load would exceed the array.
      low: The first index in the row that belongs to the tile.
      high: The index after the last one.
    """

    vec: int
    first: jax.Array
    low: jax.Array
    high: jax.Array

    @property
    def layout(self) -> Any:
        """Layout of the loaded elements: one vector per thread and load."""
        vec = self.vec
        tiling = plgpu.Tiling(((THREADS * vec,), (32 * vec,), (vec,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def indices(self) -> jax.Array:
        """Indices in the row of the loaded elements, `[TILE]`."""
        return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self.layout) + self.first * self.vec


def locate_tile(number: jax.Array, vocab_size: int, rows: list[tuple[Any, jax.Array]]) -> Tile:
    """Locates tile `number` in each of `rows`, pairs of a flat array and the index of a row in it.

    The tile has equal indices in all these rows. A tile before the first or after the last one is empty.
    """
    vec = min(config.row_vector_size(ref.dtype, vocab_size) for ref, _ in rows)
    row_vectors, tile_vectors = vocab_size // vec, TILE // vec
    first = jnp.clip(number * tile_vectors, 0, row_vectors - 1)
    for ref, row in rows:
        first = jnp.minimum(first, ref.shape[0] // vec - tile_vectors - row * row_vectors)
    high = jnp.minimum((number + 1) * TILE, vocab_size)
    return Tile(vec, first, number * TILE, high)


def load_tile(ref: Any, vocab_size: int, row: jax.Array, tile: Tile) -> jax.Array:
    """Loads `[TILE]` logits of a row; elements outside the tile may be of other tiles or rows."""
    # HBM or L2 -> registers: [TILE], vec elements per thread and load.
    elements = pl.ds((row * (vocab_size // tile.vec) + tile.first) * tile.vec, TILE)
    return plgpu.load(ref.at[elements], layout=tile.layout, optimized=False)


def mask_tile(values: jax.Array, tile: Tile, fill: float = 0.0) -> jax.Array:
    """Replaces the elements of `[TILE]` values outside the tile by `fill`."""
    index = tile.indices()
    other = plgpu.layout_cast(jnp.full(values.shape, fill, values.dtype), tile.layout)
    return jnp.where((index >= tile.low) & (index < tile.high), values, other)


def read_chunk(ref: Any, vocab_size: int, row: jax.Array, chunk: jax.Array, fn: Callable) -> Any:
    """Returns `fn(vectors, scalars, indices_fn)` of one chunk of a row.

    Vectors begin at multiples of 16 bytes. If a row does not, or if it ends inside a chunk, elements of other rows are
    passed to `fn` as -inf; chunks inside the row need no mask. `scalars` are the last elements of an array that ends
    inside a vector, -inf if they belong to another row. `indices_fn()` returns the indices in the row of vectors and
    scalars.

    Addresses are computed in vectors and multiplied last, because the compiler loads single elements unless it can
    prove that an address is a multiple of a vector.
    """
    cut = config.chunks(ref.dtype, vocab_size)
    layout = chunk_layout(cut)
    start = row * vocab_size
    end = start + vocab_size
    first_vector = row * (vocab_size // cut.vec) if cut.aligned else start // cut.vec
    low_vector = first_vector + chunk * (cut.num_loads * THREADS)

    def load(first, count):
        # HBM -> registers: count vectors of [lanes], 16 bytes per thread each.
        starts = [(first + i * THREADS) * cut.vec for i in range(count)]
        return [plgpu.load(ref.at[pl.ds(s, cut.lanes)], layout=layout) for s in starts]

    def lane():
        return plgpu.broadcasted_iota(jnp.int32, (cut.lanes,), 0, layout=layout)

    def unmasked():
        def indices():
            base = low_vector * cut.vec - start
            return [lane() + (base + i * cut.lanes) for i in range(cut.num_loads)], []

        return fn(load(low_vector, cut.num_loads), [], indices)

    def masked():
        size = ref.shape[0]
        readable = size // cut.vec
        first = jnp.minimum(low_vector, readable - cut.rest * THREADS)
        low = jnp.maximum(low_vector * cut.vec, start)
        high = jnp.minimum((low_vector + cut.num_loads * THREADS) * cut.vec, end)
        vectors = load(first, cut.rest)
        base = first * cut.vec
        for i in range(cut.rest):
            element = lane() + (base + i * cut.lanes)
            outside = plgpu.layout_cast(jnp.full((cut.lanes,), -jnp.inf, ref.dtype), layout)
            vectors[i] = jnp.where((element >= low) & (element < high), vectors[i], outside)
        # The last elements of an array that ends inside a vector are in the last chunk of its last row.
        last = range(readable * cut.vec, size)
        scalars = [jnp.where((i >= low) & (i < high), ref[i].astype(jnp.float32), -jnp.inf) for i in last]

        def indices():
            inside = [lane() + (base - start + i * cut.lanes) for i in range(cut.rest)]
            return inside, [jnp.int32(i) - start for i in last]

        return fn(vectors, scalars, indices)

    if cut.rest == 0:
        return unmasked()
    whole = chunk < cut.whole if cut.aligned else (chunk > 0) & (chunk < cut.whole)
    return lax.cond(whole, unmasked, masked) if cut.whole > (not cut.aligned) else masked()
