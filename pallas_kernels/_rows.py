"""What is done to one row of logits inside a kernel. A row lies anywhere in a flat array of rows."""

import functools
import math
from collections.abc import Callable
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


def _steps(ref: Any, vocab_size: int, row: jax.Array, block: jax.Array, num_blocks: int, fn: Callable, init: Any):
    """Folds `fn(carry, vectors, positions)` over a block's share of a row, 16-byte loads whatever V is.

    Vectors begin at multiples of 16 bytes. Where a row does not, its first and last steps hold elements of
    its neighbours, which reach `fn` as -inf; all steps between are free of masks. `positions()` are the
    places in the row. The blocks take steps in turn.

    Addresses are counted in vectors, and multiplied last: where the compiler does not see that they are
    multiples of a vector, it loads single elements.
    """
    size, dtype = ref.shape[0], ref.dtype
    vec = config.vector_size(dtype)
    lanes = config.THREADS * vec
    num = config.num_loads(dtype, vocab_size)
    step, step_vectors = num * lanes, num * config.THREADS
    layout = plgpu.Layout.WG_STRIDED((lanes,), vec_size=vec)
    odd = int(vocab_size % vec != 0)
    start, end = row * vocab_size, (row + 1) * vocab_size
    first_vector = start // vec if odd else row * (vocab_size // vec)
    whole = vocab_size // step
    readable = size // vec * vec

    def load(first):
        # HBM -> registers: num vectors of [lanes], 16 bytes a thread each.
        return [plgpu.load(ref.at[pl.ds((first + i * config.THREADS) * vec, lanes)], layout=layout) for i in range(num)]

    def lane():
        return plgpu.broadcasted_iota(jnp.int32, (lanes,), 0, layout=layout)

    def unmasked(_, state):
        # The address is carried from step to step: nothing is left to simplify in it, so the factor is seen.
        first, carry = state
        carry = fn(carry, load(first), lambda: [lane() + (first * vec - start + k * lanes) for k in range(num)])
        return first + num_blocks * step_vectors, carry

    def masked(i, carry):
        which = edge + i * num_blocks
        j = jnp.where(which < odd, 0, whole - odd + which)
        low = first_vector + j * step_vectors
        last = jnp.minimum((end + vec - 1) // vec, readable // vec) - step_vectors
        first = jnp.minimum(low, last)
        low = low * vec
        high = jnp.minimum(low + step, end)
        low = jnp.maximum(low, start)
        vectors, index = load(first), lane()
        for k in range(num):
            at = index + (first * vec + k * lanes)
            inside = (at >= low) & (at < high)
            nothing = plgpu.layout_cast(jnp.full((lanes,), -jnp.inf, dtype), layout)
            vectors[k] = jnp.where(inside, vectors[k], nothing)
        return fn(carry, vectors, lambda: [index + (first * vec - start + k * lanes) for k in range(num)])

    def share(count, taken):
        """How many of `count` steps are left to the block that comes `taken` steps into the round."""
        return jnp.maximum(count - taken + num_blocks - 1, 0) // num_blocks

    num_whole = max(whole - odd, 0)
    num_edge = -(-(vocab_size + odd * (vec - 1)) // step) - num_whole
    carry = init
    if num_whole:
        first = first_vector + (odd + block) * step_vectors
        _, carry = lax.fori_loop(0, share(num_whole, block), unmasked, (first, carry))
    if num_edge:
        edge = lax.rem(block + (num_blocks - num_whole % num_blocks), num_blocks)
        carry = lax.fori_loop(0, share(num_edge, edge), masked, carry)
    if size > readable:
        # The array ends inside a vector: its last elements one by one, for its last row only.
        def single(i, carry):
            at = readable + i
            only = jnp.where(lane() == 0, ref[at].astype(jnp.float32), -jnp.inf)
            only = plgpu.layout_cast(only, layout)
            return fn(carry, [only], lambda: [lane() + (at - start)])

        carry = lax.fori_loop(0, jnp.where((end > readable) & (block == 0), end - readable, 0), single, carry)
    return carry


def _full(dtype: Any, lanes: int, vec: int, value: float | int) -> jax.Array:
    return plgpu.layout_cast(jnp.full((lanes,), value, dtype), plgpu.Layout.WG_STRIDED((lanes,), vec_size=vec))


def log_sum_share(
    ref: Any, vocab_size: int, row: jax.Array, scale: Any, cutoff: Any, block: jax.Array, num_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a block's share of a row, and the sum of kept exp((x - largest) * scale).

    Every lane keeps a maximum and a sum of its own, so that no thread waits for another before the end.
    Not finite where the share holds NaN or +inf. All -inf: `LOWEST` and 0.
    """
    vec = config.vector_size(ref.dtype)
    lanes = config.THREADS * vec
    rate = LOG2_E if scale is None else scale * LOG2_E

    def fold(carry, vectors, positions):
        del positions
        largest, total = carry
        new = jnp.maximum(largest, functools.reduce(jnp.maximum, vectors).astype(jnp.float32))
        total = total * jnp.exp2((largest - new) * rate)
        for x in vectors:
            x = x.astype(jnp.float32)
            weight = jnp.exp2((x - new) * rate)
            if cutoff is not None:
                weight = jnp.where(x >= cutoff, weight, 0.0)
            total = total + weight
        return new, total

    init = _full(jnp.float32, lanes, vec, LOWEST), _full(jnp.float32, lanes, vec, 0.0)
    largest, total = _steps(ref, vocab_size, row, block, num_blocks, fold, init)
    top = jnp.max(largest)
    return top, jnp.sum(total * jnp.exp2((largest - top) * rate))


def first_largest_share(
    ref: Any, vocab_size: int, row: jax.Array, block: jax.Array, num_blocks: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Largest number of a block's share of a row, its first place, and 1, or NaN where the share has a NaN."""
    vec = config.vector_size(ref.dtype)
    lanes = config.THREADS * vec

    def fold(carry, vectors, positions):
        largest, first, poison = carry
        for x, at in zip(vectors, positions(), strict=True):
            x = x.astype(jnp.float32)
            better = (x > largest) | ((x == largest) & (at < first))
            first = jnp.where(better, at, first)
            largest = jnp.where(better, x, largest)
            poison = jnp.maximum(poison, x)
        return largest, first, poison

    init = (
        _full(jnp.float32, lanes, vec, LOWEST),
        _full(jnp.int32, lanes, vec, NOWHERE),
        _full(jnp.float32, lanes, vec, LOWEST),
    )
    largest, first, poison = _steps(ref, vocab_size, row, block, num_blocks, fold, init)
    top = jnp.max(largest)
    first = jnp.min(jnp.where(largest == top, first, NOWHERE))
    poison = jnp.max(poison)
    return top, first, jnp.where(poison == poison, 1.0, poison)


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

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) // 2
        beyond = jnp.sum(jnp.where(index <= middle, weights, 0.0)) > wanted
        return jnp.where(beyond, low, middle + 1), jnp.where(beyond, middle, high)

    low, _ = lax.fori_loop(0, n.bit_length() - 1, halve, (jnp.int32(0), jnp.int32(n - 1)))
    last = jnp.max(jnp.where(weights > 0, index, -1))
    return jnp.maximum(jnp.minimum(low, last), 0)
