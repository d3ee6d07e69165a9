"""One token per row and the logsumexp of its filtered logits, in one launch.

A cluster of blocks holds a row in its registers, as in `cutoff`. Every block leaves the sums of its tiles' weights;
after the cluster has met, the first block picks a tile by its share, reads that tile again, and picks a token. With
top-k, top-p or min-p the cutoff is found before, and the cluster meets once more. Rows that are greedy or degenerate
take their first largest logit instead. The two uniforms of a row come from its key (`random`).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config, cutoff, emit, random, scan, slices, sync
from pallas_kernels import tiles as tiling
from pallas_kernels.limits import Limits, RowLimits, arrays_of, numbers_of, row_limits
from pallas_kernels.rows import LOWEST, MAX_INDEX, exp2_rate
from pallas_kernels.slices import Exchange, Scratch, Slice
from pallas_kernels.types import TILE

AT_ONCE = 4
"""Tiles that are added up together: their weights are in registers beside the row."""


class Sums(NamedTuple):
    """Of each tile of a row, in global memory, `[B, tiles]`: the sum of its weights, and the largest logit beside it.

    `first` is of each block, `[B, MAX_CLUSTER]`: the index of its first largest logit that is a number, and `top` that.
    """

    sums: Any
    tops: Any
    first: Any
    top: Any


def sample(
    logits: Float[Array, "B V"], limits: Limits, noise: random.Noise
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Draws one token per row from its filtered logits, on a GPU, Hopper or newer.

    Two-level inversion: the first uniform picks a tile of `TILE` tokens by its sum, the second a token in it. Logits as
    for `cutoff.cutoffs`.

    Args:
      logits: bfloat16, float16 or float32.
      limits: Numbers, or arrays `[B]`.
      noise: Source of the uniforms.

    Returns:
      tokens `[B]` and log_normalizers `[B]`; those of degenerate rows are not finite.
    """
    batch_size, vocab_size = logits.shape
    blocks = slices.num_blocks(batch_size, vocab_size)
    numbers, arrays = numbers_of(limits), arrays_of(limits, batch_size)
    width = config.to_lanes(config.num_tiles(vocab_size))
    each = batch_size, width
    of_blocks = batch_size, slices.MAX_CLUSTER
    sums = Sums(
        jax.ShapeDtypeStruct(each, jnp.float32),
        jax.ShapeDtypeStruct(each, jnp.float32),
        jax.ShapeDtypeStruct(of_blocks, jnp.int32),
        jax.ShapeDtypeStruct(of_blocks, jnp.float32),
    )
    results = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    shared = (
        slices.scratch(),
        slices.tiles_scratch(logits.dtype, vocab_size, blocks),
        plgpu.SMEM((32,), jnp.float32),
        scan.search_scratch(config.num_tiles(vocab_size)),
    )

    def sample(inputs, results, sums, between, shared, kept_tiles, few, room, barrier):
        noise, logits, arrays = inputs
        tokens, normalizers = results
        row, block = lax.axis_index("sequence"), lax.axis_index("block")
        part = slices.load_slice(logits, vocab_size, row, row, block, blocks, kept_tiles, barrier)
        # Computed while the logits are on their way.
        uniforms = random.emit_uniforms(noise, row)
        chosen = _sample_row(part, row_limits(numbers, arrays, row), uniforms, sums, between, shared, few, room)

        @pl.when(block == 0)
        def _():
            tokens[row], normalizers[row] = chosen

    results, _, _ = plgpu.kernel(
        sample,
        out_type=(results, sums, slices.exchange(batch_size, blocks)),
        scratch_types=(*shared, sync.cluster_scratch()),
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )((noise, logits.reshape(-1), arrays))
    return results


def _sample_row(
    part: Slice,
    limits: RowLimits,
    uniforms: list[jax.Array],
    sums: Sums,
    between: Exchange,
    shared: Scratch,
    few: Any,
    room: Any,
) -> tuple[jax.Array, jax.Array]:
    """The token, for the first block of a cluster, and the logsumexp."""
    scan.clear_prefix(room)
    rate = exp2_rate(limits.scale)
    cut = None
    # What is read again is read from there: in registers the row would leave no space for more blocks.
    _keep_in_shared(part)

    def of_tile(i):
        # Shared memory -> registers: [TILE].
        return weights(plgpu.load(part.shared.at[i], layout=part.layout, optimized=False))

    if limits.top_k is None and limits.top_p is None and limits.min_p is None:
        top = jnp.max(functools.reduce(jnp.maximum, part.tiles).astype(jnp.float32))
        # A number, so that minus infinity less this is none.
        reference = jnp.maximum(top, LOWEST)
        weights = functools.partial(_weights, reference=reference, rate=rate, cut=None)
        _write_sums(part, of_tile, reference, sums, few)
    else:
        kept = cutoff.find(part, limits._replace(greedy=None), between, shared)
        cut, reference = kept.cutoff, kept.largest
        weights = functools.partial(_weights, reference=reference, rate=rate, cut=cut)
        _write_sums(part, of_tile, reference, sums, few)
    slices.meet(part)
    num_tiles = config.num_tiles(part.vocab_size)
    of_tiles, tops = (
        _first_lanes(ref.at[part.row], num_tiles, nothing) for ref, nothing in ((sums.sums, 0.0), (sums.tops, LOWEST))
    )
    largest = jnp.max(tops)
    found = scan.running_sums(room, of_tiles * jnp.exp2((tops - largest) * rate))
    # Not finite where the row is degenerate: of minus infinity everywhere the largest is no logit, and the sum 0.
    log_sum = jnp.log(found.total)
    degenerate = ~(jnp.abs(largest + log_sum) < jnp.inf)
    certain = degenerate if limits.greedy is None else degenerate | limits.greedy
    if limits.greedy is not None:
        log_sum = jnp.where(~degenerate & limits.greedy, 0.0, log_sum)
    normalizer = (largest if limits.scale is None else largest * limits.scale) + log_sum

    def draw():
        def choose():
            return _choose(part, found, uniforms, room, largest, rate, cut)

        return lax.cond(part.block == 0, choose, lambda: jnp.int32(0))

    return lax.cond(certain, lambda: _first_largest(part, sums), draw), normalizer


def _weights(x: jax.Array, reference: Any, rate: Any, cut: Any) -> jax.Array:
    x = x.astype(jnp.float32)
    weight = jnp.exp2((x - reference) * rate)
    return weight if cut is None else jnp.where(x >= cut, weight, 0.0)


def _keep_in_shared(part: Slice):
    for i, x in enumerate(part.tiles):
        # Registers -> shared memory: [TILE].
        scan.store_sums(part.shared.at[i], x)


def _write_sums(part: Slice, weights_fn: Any, reference: Any, sums: Sums, few: Any):
    """Leaves the sums of this block's tiles, and what they are relative to, for the other blocks."""
    count = len(part.tiles)
    for first in range(0, count, AT_ONCE):
        some = [weights_fn(i) for i in range(first, min(first + AT_ONCE, count))]
        scan.store_sums(few.at[pl.ds(first, len(some))], scan.sum_vectors(some, part.vec))
    for i in range(count):
        tile = i * part.num_blocks + part.block
        # Shared memory -> L2: one number.
        sums.sums[part.row, tile] = few[i]
        sums.tops[part.row, tile] = reference


def _first_lanes(ref: Any, count: int, nothing: Any) -> jax.Array:
    layout = tiling.lane_layout(ref.shape[-1])
    lane = plgpu.broadcasted_iota(jnp.int32, (ref.shape[-1],), 0, layout=layout)
    return jnp.where(lane < count, plgpu.load(ref, layout=layout, optimized=False), nothing)


def _choose(part: Slice, found: Any, uniforms: Any, room: Any, largest: Any, rate: Any, cut: Any):
    """A tile by the first uniform and a token in it by the second."""
    number = scan.first_beyond(found, uniforms[0] * found.total)
    tile = tiling.locate_tile(number, part.vocab_size, [(part.logits, part.row)], True)
    # L2 -> registers: [TILE].
    x = tiling.load_tile(part.logits, part.vocab_size, part.row, tile)
    weights = tiling.mask_tile(_weights(x, largest, rate, cut), tile)
    index = scan.first_in_tile_beyond(room, weights, uniforms[1])
    return jnp.clip(tile.first * tile.vec + index, 0, part.vocab_size - 1)


def _first_largest(part: Slice, sums: Sums) -> jax.Array:
    """The first largest logit that is a number; 0 where none is."""

    def step(i, carry):
        top, first = carry
        tile = tiling.locate_tile(i * part.num_blocks + part.block, part.vocab_size, [(part.logits, part.row)], False)
        x = plgpu.load(part.shared.at[i], layout=part.layout, optimized=False).astype(jnp.float32)
        x = jnp.where(x == x, x, -jnp.inf)
        return jnp.maximum(top, x), jnp.where(x > top, tile.indices(), first)

    start = [plgpu.layout_cast(jnp.full((TILE,), value), part.layout) for value in (-jnp.inf, MAX_INDEX)]
    tops, places = lax.fori_loop(0, len(part.tiles), step, tuple(start))
    top = jnp.max(tops)
    sums.top[part.row, part.block] = top
    sums.first[part.row, part.block] = jnp.min(jnp.where(tops == top, places, MAX_INDEX))
    slices.meet(part)
    of_blocks = slices.of_blocks(sums.top.at[part.row], part, -jnp.inf)
    largest = jnp.max(of_blocks)
    firsts = slices.of_blocks(sums.first.at[part.row], part, MAX_INDEX)
    first = jnp.min(jnp.where(of_blocks == largest, firsts, MAX_INDEX))
    return jnp.where(largest > -jnp.inf, first, 0)
