"""What is done to one row of logits inside a kernel: probabilities, and its tiles."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels.types import TILE

LOG2_E = 1 / math.log(2)
"""exp(x) is exp2(x * LOG2_E), and exp2 is one instruction."""

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Where a running maximum starts: a number, so that minus infinity less this is no NaN."""

NOWHERE = 2**31 - 1
"""An index above all others."""


def rate(scale: Any) -> Any:
    """What a difference of logits is multiplied by, for a power of two."""
    return LOG2_E if scale is None else scale * LOG2_E


def singles(count: int) -> Any:
    """The layout of a vector of numbers, one a thread at a time; of at most a warp's, copies in every warp."""
    if count <= config.WARP:
        warps, copies = config.THREADS // config.WARP, config.WARP // count
        lanes = (plgpu.Replicated(copies), -2) if copies > 1 else (-2,)
        tiling = plgpu.Tiling(((count,), (1,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(plgpu.Replicated(warps),), lane_dims=lanes, vector_dim=-1)
    return plgpu.Layout.WG_STRIDED((count,), vec_size=1)


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
    p = jnp.exp2((x - row.offset) * rate(row.scale) - row.log_sum * LOG2_E)
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
            return plgpu.Layout.WG_STRIDED((TILE,), vec_size=self.vec)
        vec = self.vec
        tiling = plgpu.Tiling(((config.THREADS * vec,), (32 * vec,), (vec,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)

    def place(self) -> jax.Array:
        """The places in the row."""
        return plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=self.layout) + self.first * self.vec


def tile_at(tile: jax.Array, vocab_size: int, places: list[tuple[Any, jax.Array]], in_shared: bool) -> Tile:
    """The tile of that number in every row of `places`, pairs of an array of rows and a row's number.

    All of them are read at the same places of their rows. A tile before the first or past the last is empty.
    """
    vec = min(config.row_vector_size(ref.dtype, vocab_size) for ref, _ in places)
    row_vectors, tile_vectors = vocab_size // vec, TILE // vec
    first = jnp.clip(tile * tile_vectors, 0, row_vectors - 1)
    for ref, row in places:
        first = jnp.minimum(first, ref.shape[0] // vec - tile_vectors - row * row_vectors)
    high = jnp.minimum((tile + 1) * TILE, vocab_size)
    return Tile(vec, first, in_shared, tile * TILE, high)


def load_tile(ref: Any, vocab_size: int, row: jax.Array, tile: Tile) -> jax.Array:
    """[TILE] logits of a row."""
    # HBM or L2 -> registers: [TILE], vec elements a thread and load.
    at = pl.ds((row * (vocab_size // tile.vec) + tile.first) * tile.vec, TILE)
    return plgpu.load(ref.at[at], layout=tile.layout, optimized=False)


def only_inside(values: jax.Array, tile: Tile, nothing: float = 0.0) -> jax.Array:
    """[TILE] values, and `nothing` where the tile does not reach."""
    place = tile.place()
    other = plgpu.layout_cast(jnp.full(values.shape, nothing, values.dtype), tile.layout)
    return jnp.where((place >= tile.low) & (place < tile.high), values, other)
