"""Samples one token per row and computes the logsumexp of the filtered logits, in one launch.

Grid (sequence,), one cluster of blocks per row.

1. The cluster loads the row into registers, and each block copies its share to its shared memory (`slices`).
2. With top-k, top-p or min-p, the cluster finds the cutoff (`cutoff`), which takes at least one cluster barrier.
3. Each block sums the weights `exp((x - reference) * scale)` of each of its tiles. It writes these sums to global
   memory.
4. After a cluster barrier, every block computes the logsumexp from the sums of all tiles. Block 0 picks a tile with
   probability proportional to its sum, loads that tile again, picks a token in it, and writes both outputs.

Greedy and degenerate rows take their first largest logit instead. The two uniforms of a row are computed from its key
in the kernel (`random`).

`sample_unfiltered` and `sample_filtered` are faster where they apply. Top-p alone, a large top-k and greedy parameters
are left to this kernel.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config, emit, random, scan, slices, sync
from pallas_kernels import tiles as tiling
from pallas_kernels.cutoff import find_cutoff
from pallas_kernels.limits import Limits, RowLimits, array_limits, row_limits, static_limits
from pallas_kernels.rows import LOWEST, MAX_INDEX, exp2_rate
from pallas_kernels.slices import Exchange, Kept, Scratch, Slice
from pallas_kernels.types import TILE

TILES_AT_ONCE = 4
"""Tiles whose weights a block sums together. Their weights are in registers at the same time."""


class Sums(NamedTuple):
    """Per-tile and per-block results in global memory, through which the blocks of a cluster communicate.

    Attributes:
      sums: Sum of the weights of each tile, `[B, tiles]`.
      tops: Logit that is subtracted in these weights, `[B, tiles]`.
      first: Index of the first largest logit of each block's share, `[B, MAX_CLUSTER]`; set in greedy and degenerate
        rows only. NaN is skipped.
      top: That logit, `[B, MAX_CLUSTER]`.
    """

    sums: Any
    tops: Any
    first: Any
    top: Any


def sample(
    logits: Float[Array, "B V"], limits: Limits, noise: random.Noise
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples one token per row from its filtered logits, on a Hopper or newer GPU.

    Two-level inversion: the first uniform picks a tile of `TILE` tokens by its sum, the second a token in it.

    Args:
      logits: bfloat16, float16 or float32, with V of at least `TILE` and `slices.supports(V)`.
      limits: Sampling parameters, each a number or an array `[B]`.
      noise: Source of the uniforms.

    Returns:
      tokens `[B]`, and log_normalizers `[B]`, which are not finite in degenerate rows.
    """
    batch_size, vocab_size = logits.shape
    blocks = slices.num_blocks(batch_size, vocab_size)
    static, arrays = static_limits(limits), array_limits(limits, batch_size)
    sums = sums_types(batch_size, vocab_size)
    results = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    shared = (
        slices.scratch(),
        slices.tiles_scratch(logits.dtype, vocab_size, blocks),
        plgpu.SMEM((32,), jnp.float32),
        scan.choose_scratch(),
    )

    def sample(inputs, results, sums, exchange, shared, row_tiles, tile_sums, scan_scratch, barrier):
        noise, logits, arrays = inputs
        tokens, normalizers = results
        row, block = lax.axis_index("sequence"), lax.axis_index("block")
        part = slices.locate_slice(logits, vocab_size, row, row, block, blocks, row_tiles, barrier)
        part = slices.load_slice(part)
        # Computed while the loads of the logits are in flight.
        uniforms = scan.hold(scan_scratch, random.emit_uniforms(noise, row))
        result = _sample_row(
            part, row_limits(static, arrays, row), uniforms, sums, exchange, shared, tile_sums, scan_scratch
        )

        @pl.when(block == 0)
        def _():
            tokens[row], normalizers[row] = result

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


def sums_types(batch_size: int, vocab_size: int) -> Sums:
    """Types of `Sums`."""
    per_tile = batch_size, config.to_lanes(config.num_tiles(vocab_size))
    per_block = batch_size, slices.MAX_CLUSTER
    return Sums(
        jax.ShapeDtypeStruct(per_tile, jnp.float32),
        jax.ShapeDtypeStruct(per_tile, jnp.float32),
        jax.ShapeDtypeStruct(per_block, jnp.int32),
        jax.ShapeDtypeStruct(per_block, jnp.float32),
    )


def _sample_row(
    part: Slice,
    limits: RowLimits,
    uniforms: list[jax.Array],
    sums: Sums,
    exchange: Exchange,
    shared: Scratch,
    tile_sums: Any,
    scan_scratch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns the token, which only block 0 is sure to have (other blocks may return 0), and the logsumexp."""
    # Later passes read the row from shared memory, because fewer blocks would fit if it stayed in registers.
    slices.store_slice(part)

    if limits.top_k is None and limits.top_p is None and limits.min_p is None:
        top = jnp.max(functools.reduce(jnp.maximum, part.tiles).astype(jnp.float32))
        # Finite, so that -inf minus the reference is -inf and not NaN.
        kept = Kept(jnp.maximum(top, LOWEST), None, None, None)
    else:
        kept = find_cutoff(part, limits._replace(greedy=None), exchange, shared)
    return sample_shared(part, limits, kept, uniforms, sums, tile_sums, scan_scratch)


def sample_shared(
    part: Slice, limits: RowLimits, kept: Kept, uniforms: list[jax.Array], sums: Sums, tile_sums: Any, scan_scratch: Any
) -> tuple[jax.Array, jax.Array]:
    """Like `_sample_row`, of a row in `part.shared` whose cutoff is found; `kept.cutoff` is None without filters."""
    rate = exp2_rate(limits.scale)
    cutoff, reference = kept.cutoff, kept.largest

    def tile_weights(i):
        # Shared memory -> registers: [TILE].
        return weights_fn(plgpu.load(part.shared.at[i], layout=part.layout, optimized=False))

    weights_fn = functools.partial(_weights, reference=reference, rate=rate, cutoff=cutoff)
    _write_sums(part, tile_weights, reference, sums, tile_sums)
    slices.sync_blocks(part.num_blocks, part.barrier)
    num_tiles = config.num_tiles(part.vocab_size)
    sums_by_tile, tops = (
        tiling.load_first_lanes(ref, (part.row,), num_tiles, fill)
        for ref, fill in ((sums.sums, 0.0), (sums.tops, LOWEST))
    )
    largest = jnp.max(tops)
    by_tile = sums_by_tile * jnp.exp2((tops - largest) * rate)
    number, total = scan.choose(scan_scratch, by_tile, uniforms[0], tiling.lane_layout(by_tile.shape[0]))
    # largest + log_sum is not finite in degenerate rows. If all logits are -inf, the sum is 0 or NaN.
    log_sum = jnp.log(total)
    degenerate = ~(jnp.abs(largest + log_sum) < jnp.inf)
    takes_largest = degenerate if limits.greedy is None else degenerate | limits.greedy
    if limits.greedy is not None:
        log_sum = jnp.where(~degenerate & limits.greedy, 0.0, log_sum)
    normalizer = (largest if limits.scale is None else largest * limits.scale) + log_sum

    def draw():
        def choose():
            return _choose(part, number, uniforms[1], scan_scratch, largest, rate, cutoff)

        return lax.cond(part.block == 0, choose, lambda: jnp.int32(0))

    # All blocks take the same branch, because they compute `takes_largest` from the same values: the first branch has a
    # cluster barrier.
    return lax.cond(takes_largest, lambda: _first_largest(part, sums), draw), normalizer


def _weights(x: jax.Array, reference: Any, rate: Any, cutoff: Any) -> jax.Array:
    """exp((x - reference) * scale) of logits, 0 below the cutoff; `rate` is scale * log2(e)."""
    x = x.astype(jnp.float32)
    weight = jnp.exp2((x - reference) * rate)
    return weight if cutoff is None else jnp.where(x >= cutoff, weight, 0.0)


def _write_sums(part: Slice, weights_fn: Any, reference: Any, sums: Sums, tile_sums: Any):
    """Writes the sum of the weights of each tile of this block, and the reference of these weights, to `sums`."""
    count = part.shared.shape[0]
    for start in range(0, count, TILES_AT_ONCE):
        weights = [weights_fn(i) for i in range(start, min(start + TILES_AT_ONCE, count))]
        if len(weights) == 1:  # Mosaic stores no vector of one sum.
            tile_sums[start] = jnp.sum(weights[0])
        else:
            tiling.store(tile_sums.at[pl.ds(start, len(weights))], scan.sum_vectors(weights, part.vec))
    for i in range(count):
        tile = i * part.num_blocks + part.block
        # Shared memory -> L2: one float32.
        sums.sums[part.row, tile] = tile_sums[i]
        sums.tops[part.row, tile] = reference


def _choose(part: Slice, number: Any, uniform: Any, scan_scratch: Any, largest: Any, rate: Any, cutoff: Any):
    """Picks a token in tile `number`."""
    tile = tiling.locate_tile(number, part.vocab_size, [(part.logits, part.row)])
    # L2 -> registers: [TILE].
    x = tiling.load_tile(part.logits, part.vocab_size, part.row, tile)
    weights = tiling.mask_tile(_weights(x, largest, rate, cutoff), tile)
    index = scan.choose(scan_scratch, weights, uniform, tile.layout).number
    return jnp.clip(tile.first * tile.vec + index, 0, part.vocab_size - 1)


def _first_largest(part: Slice, sums: Sums) -> jax.Array:
    """Index of the first largest logit of the row, NaN skipped; 0 if no logit is larger than -inf."""

    def step(i, carry):
        top, first = carry
        tile = tiling.locate_tile(i * part.num_blocks + part.block, part.vocab_size, [(part.logits, part.row)])
        x = plgpu.load(part.shared.at[i], layout=part.layout, optimized=False).astype(jnp.float32)
        x = jnp.where(x == x, x, -jnp.inf)
        return jnp.maximum(top, x), jnp.where(x > top, tile.indices(), first)

    start = [plgpu.layout_cast(jnp.full((TILE,), value), part.layout) for value in (-jnp.inf, MAX_INDEX)]
    tops, indices = lax.fori_loop(0, part.shared.shape[0], step, tuple(start))
    top = jnp.max(tops)
    sums.top[part.row, part.block] = top
    sums.first[part.row, part.block] = jnp.min(jnp.where(tops == top, indices, MAX_INDEX))
    slices.sync_blocks(part.num_blocks, part.barrier)
    block_tops = slices.load_per_block(sums.top, (part.row,), part, -jnp.inf)
    largest = jnp.max(block_tops)
    firsts = slices.load_per_block(sums.first, (part.row,), part, MAX_INDEX)
    first = jnp.min(jnp.where(block_tops == largest, firsts, MAX_INDEX))
    return jnp.where(largest > -jnp.inf, first, 0)
