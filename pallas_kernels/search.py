"""Search of a whole row for its cutoff, if the candidates cannot be listed (see `cutoff`).

The search narrows an interval of ranks, integers that are ordered like the floating-point numbers (`_rank`). In each
round, three thresholds divide the interval into four parts. Each block counts the logits of its share that are at least
a threshold, or sums their weights, and writes the results to `Exchange.sums`. After the cluster barrier, every block
adds up the results of all blocks in the same order, so all blocks choose the same part. There is one cluster barrier
per round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, scan, slices
from pallas_kernels import tiles as tiling
from pallas_kernels.limits import RowLimits, min_p_cutoff
from pallas_kernels.rows import LOWEST, exp2_rate
from pallas_kernels.slices import NUM_THRESHOLDS, Kept, Slice
from pallas_kernels.types import TILE

SLACK = 0.05
"""Margin, in scaled logits, for rounding errors: the search for top-p starts this much below its exact lower bound."""


TOP_K, MASS, TOP_P, TOTAL, DONE = range(5)
"""Stages of the search.

TOP_K searches for the cutoff of top-k. MASS sums the weights of the logits that top-k keeps. TOP_P searches for the
cutoff of top-p. TOTAL sums the weights of the logits that all filters keep.
"""


class _State(NamedTuple):
    """State of the search.

    Attributes:
      stage: The stage.
      low, high: Interval `[low, high)` of ranks that contains the cutoff of the stage.
      cutoff: Largest cutoff of the stages that are complete.
      required: Count (top-k) or sum of weights (top-p) that the logits at or above the cutoff of the stage must reach.
      total: Result of the last round for its first threshold.
      buffer: Buffer of `Exchange.sums` that the next round writes, 0 or 1.
    """

    stage: Any
    low: Any
    high: Any
    cutoff: Any
    required: Any
    total: Any
    buffer: Any


def search_row(part: Slice, limits: RowLimits, exchange_sums: Any, largest: Any, top_k_bound: Any) -> Kept:
    """Searches a row for its cutoff, and sums the weights of the kept logits. All blocks return equal values.

    Args:
      part: This block's share of the row, in registers or, without tiles, already in `part.shared`.
      limits: Sampling parameters of the row.
      exchange_sums: `Exchange.sums`.
      largest: Largest logit of the row.
      top_k_bound: Lower bound of the cutoff of top-k.
    """
    for i, x in enumerate(part.tiles):
        scan.store_sums(part.shared.at[i], x)
    shift, rate = _shift(part.dtype), exp2_rate(limits.scale)
    end = _scalar(lambda x: _rank(x, shift), largest) + 1
    lowest = _scalar(lambda x: _rank(x, shift), jnp.float32(LOWEST))
    uses_top_k = uses_top_p = jnp.bool_(False)
    if limits.top_k is not None:
        uses_top_k = jnp.bool_((limits.top_k > 0) & (limits.top_k < part.vocab_size))
    if limits.top_p is not None:
        uses_top_p = jnp.bool_(limits.top_p < 1)

    def finish(cutoff):
        """Combines the cutoff of top-k and top-p with that of min-p."""
        if limits.min_p is not None:
            cutoff = jnp.maximum(cutoff, min_p_cutoff(largest, limits))
        return jnp.minimum(cutoff, largest)

    def body(state: _State) -> _State:
        searching = (state.stage == TOP_K) | (state.stage == TOP_P)
        pivots = _pivots(state.low, state.high)
        thresholds = [
            jnp.where(searching, _scalar(lambda r: _unrank(r, shift), pivot), state.cutoff) for pivot in pivots
        ]
        sums = _sums_above(part, exchange_sums, thresholds, largest, rate, state.stage == TOP_K, state.buffer)
        low, high = state.low, state.high
        for pivot, total in zip(pivots, sums, strict=True):
            low = jnp.where(total >= state.required, jnp.maximum(low, pivot), low)
            high = jnp.where(total >= state.required, high, jnp.minimum(high, pivot))
        stage_cutoff = _scalar(lambda r: _unrank(r, shift), low)
        converged = low + 1 >= high
        # The next stage.
        after_top_k = jnp.where(uses_top_p, MASS, TOTAL)
        stage = jnp.where(state.stage == TOP_K, jnp.where(converged, after_top_k, TOP_K), state.stage)
        stage = jnp.where(state.stage == MASS, TOP_P, stage)
        stage = jnp.where((state.stage == TOP_P) & converged, TOTAL, stage)
        stage = jnp.where(state.stage == TOTAL, DONE, stage)
        cutoff = jnp.where(searching & converged, jnp.maximum(state.cutoff, stage_cutoff), state.cutoff)
        cutoff = jnp.where((stage == TOTAL) & (state.stage != TOTAL), finish(cutoff), cutoff)
        required = state.required
        if limits.top_p is not None:
            mass = sums[0]
            required = jnp.where(state.stage == MASS, limits.top_p * mass, required)
            start = _top_p_start(limits, largest, mass, part.vocab_size)
            start = _scalar(lambda x: _rank(x, shift), jnp.maximum(start, LOWEST))
            floor = _scalar(lambda x: _rank(x, shift), jnp.maximum(cutoff, LOWEST))
            top_p_low = jnp.minimum(jnp.maximum(start, floor), end - 1)
            # With top_p = 0 only the largest logit is kept.
            top_p_low = jnp.where(limits.top_p > 0, top_p_low, end - 1)
            low, high = jnp.where(state.stage == MASS, top_p_low, low), jnp.where(state.stage == MASS, end, high)
        return _State(stage, low, high, cutoff, required, sums[0], 1 - state.buffer)

    top_k = jnp.float32(0) if limits.top_k is None else jnp.asarray(limits.top_k).astype(jnp.float32)
    low = jnp.maximum(_scalar(lambda x: _rank(x, shift), top_k_bound), lowest)
    stage = jnp.where(uses_top_k, TOP_K, jnp.where(uses_top_p, MASS, TOTAL))
    cutoff = jnp.float32(-jnp.inf)
    cutoff = jnp.where(stage == TOTAL, finish(cutoff), cutoff)
    state = _State(stage, jnp.minimum(low, end - 1), end, cutoff, top_k, jnp.float32(0), jnp.int32(0))
    state = lax.while_loop(lambda state: state.stage < DONE, body, state)
    return Kept(largest, state.cutoff, state.total, None)


def _top_p_start(limits: RowLimits, largest: Any, mass: Any, vocab_size: int) -> jax.Array:
    """Lower bound of the cutoff of top-p.

    All logits below `largest + log((1 - p) mass / V) / scale` together weigh less than `(1 - p) mass`, because there
    are at most V of them. Top-p drops that much at most, so its cutoff is not below this bound.
    """
    dropped_share = 1 - limits.top_p
    offset = jnp.log(dropped_share * mass / vocab_size) - SLACK
    offset = offset if limits.scale is None else offset / limits.scale
    # For p close to 1, rounding errors of the float32 sums can exceed the margin. The search then starts at the lowest
    # number.
    return jnp.where(dropped_share > 2.0**-10, largest + offset, LOWEST)


def _sums_above(part, exchange_sums, thresholds, largest, rate, counting, buffer) -> list[jax.Array]:
    """For each threshold, the number of logits in the row that are at least as large, or the sum of their weights."""
    # At a rate of 0 every weight is 1, so the sum is a count. The weight of -inf is NaN, but no threshold selects it.
    rate = jnp.where(counting, 0.0, rate)

    def add(i, sums):
        # Shared memory -> registers: [TILE].
        x = plgpu.load(part.shared.at[i], layout=part.layout, optimized=False).astype(jnp.float32)
        weight = jnp.exp2((x - largest) * rate)
        kept_weights = [jnp.where(x >= threshold, weight, 0.0) for threshold in thresholds]
        return tuple(a + b for a, b in zip(sums, kept_weights, strict=True))

    zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), part.layout)
    sums = lax.fori_loop(0, part.shared.shape[0], add, (zero,) * len(thresholds))
    block_sums = scan.to_scalars(scan.sum_vectors(list(sums), part.vec), part.vec)
    for i, block_sum in enumerate(block_sums):
        exchange_sums[part.row, buffer, i, part.block] = block_sum
    slices.sync_blocks(part.num_blocks, part.barrier)
    return [
        jnp.sum(slices.load_per_block(exchange_sums.at[part.row, buffer, i], part, 0.0)) for i in range(len(thresholds))
    ]


def _pivots(low: Any, high: Any) -> list[jax.Array]:
    """Ranks inside `[low, high)` that divide it into parts of about equal size."""
    # Divided before the subtraction, because high - low can overflow int32.
    num_parts = NUM_THRESHOLDS + 1
    step = jnp.maximum(high // num_parts - low // num_parts, 1)
    return [jnp.minimum(low + step * i, jnp.maximum(high - 1, low)) for i in range(1, num_parts)]


def _shift(dtype: Any) -> int:
    """Number of low bits that are zero in the float32 representation of every normal number of a dtype."""
    return {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}.get(jnp.dtype(dtype), 0)


def _rank(x: jax.Array, shift: int) -> jax.Array:
    """Maps float32 to int32 ranks in the same order; both zeros have rank 0.

    Adjacent numbers of a dtype with this `_shift` have adjacent ranks.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, jnp.int32(-(2**31)) - bits) >> shift


def _unrank(rank: jax.Array, shift: int) -> jax.Array:
    """Inverse of `_rank`."""
    bits = rank << shift
    return lax.bitcast_convert_type(jnp.where(bits >= 0, bits, jnp.int32(-(2**31)) - bits), jnp.float32)


def _scalar(fn: Any, value: Any) -> jax.Array:
    """Applies `fn` to a scalar by way of a vector, because Mosaic GPU bitcasts vectors only."""
    vector = jnp.full((config.MIN_LANES,), value)
    return jnp.max(fn(plgpu.layout_cast(vector, tiling.lane_layout(config.MIN_LANES))))


def round_down(x: Any, dtype: Any) -> jax.Array:
    """Rounds x down to a finite number of a dtype; for float16, values below its normal range are rounded coarsely."""
    shift = _shift(dtype)
    lower = _scalar(lambda x: _unrank(_rank(x, shift), shift), x)
    if dtype == jnp.float16:
        # Subnormal float16 numbers have fewer mantissa bits than `_shift` assumes.
        lower = jnp.where(jnp.abs(lower) >= 2.0**-14, lower, jnp.where(lower >= 0, 0.0, -(2.0**-14)))
    return jnp.maximum(lower, float(jnp.finfo(dtype).min))
