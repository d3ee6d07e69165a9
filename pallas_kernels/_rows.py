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


class Row(NamedTuple):
    """What makes a distribution of a row: p(x) = exp((x - offset) * scale - log_sum) where x >= cutoff."""

    offset: jax.Array
    log_sum: jax.Array
    scale: jax.Array | None
    cutoff: jax.Array | None


def prob(x: jax.Array, row: Row) -> jax.Array:
    """P of a vector of logits."""
    z = x - row.offset
    if row.scale is not None:
        z = z * row.scale
    p = jnp.exp2((z - row.log_sum) * LOG2_E)
    return p if row.cutoff is None else jnp.where(x >= row.cutoff, p, 0.0)


class Tile(NamedTuple):
    """Where a tile of a row is read: at vector `first` of the row, moved back where arrays end."""

    vec: int
    first: jax.Array
    place: jax.Array
    inside: jax.Array


def tile_at(tile: jax.Array, vocab_size: int, places: list[tuple[Any, jax.Array]]) -> Tile:
    """The tile of that number in every row of `places`, pairs of an array of rows and a row's number.

    All of them are read at the same places of their rows. A tile past the last is empty.
    """
    vec = min(config.row_vector_size(ref.dtype, vocab_size) for ref, _ in places)
    row_vectors, tile_vectors = vocab_size // vec, config.TILE // vec
    first = jnp.minimum(tile * tile_vectors, row_vectors - 1)
    for ref, row in places:
        first = jnp.minimum(first, ref.shape[0] // vec - tile_vectors - row * row_vectors)
    index = first * vec + plgpu.broadcasted_iota(
        jnp.int32, (config.TILE,), 0, layout=plgpu.Layout.WG_STRIDED((config.TILE,), vec_size=vec)
    )
    inside = (index >= tile * config.TILE) & (index < jnp.minimum((tile + 1) * config.TILE, vocab_size))
    return Tile(vec, first, index, inside)


def load_tile(ref: Any, vocab_size: int, row: jax.Array, tile: Tile) -> jax.Array:
    """[TILE] logits of a row, in float32."""
    layout = plgpu.Layout.WG_STRIDED((config.TILE,), vec_size=tile.vec)
    # HBM or L2 -> registers: [TILE], vec elements a thread and load.
    at = pl.ds((row * (vocab_size // tile.vec) + tile.first) * tile.vec, config.TILE)
    return plgpu.load(ref.at[at], layout=layout).astype(jnp.float32)


def search(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the running sum of [n] weights exceeds `uniform` times their total, n = 2**k.

    The running sum at an index is a sum of all weights, those after it replaced by zero: always over the same
    tree, so that it never decreases, and by bisection, since the compiler has no running sums. Where rounding
    leaves no index, the last positive weight; where none is positive, 0.
    """
    n = weights.shape[0]
    index = lax.broadcasted_iota(jnp.int32, (n,), 0)
    wanted = uniform * jnp.sum(weights)

    # As a loop with no known end: unrolled, its code would take longer to fetch than to run.
    def halve(bounds):
        low, high = bounds
        middle = (low + high) // 2
        beyond = jnp.sum(jnp.where(index <= middle, weights, 0.0)) > wanted
        return jnp.where(beyond, low, middle + 1), jnp.where(beyond, middle, high)

    low, _ = lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (jnp.int32(0), jnp.int32(n - 1)))
    last = jnp.max(jnp.where(weights > 0, index, -1))
    return jnp.maximum(jnp.minimum(low, last), 0)
