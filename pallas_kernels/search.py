"""Search of a whole row for its cutoff, if the candidates cannot be listed (see `cutoff`).

The search narrows an interval of ranks, integers that are ordered like the floating-point numbers (`_rank`). In each
round, three thresholds divide the interval into four parts. Each block counts the logits of its share that are at least
a threshold, or sums their weights, and writes the results to `Exchange.sums`. After the cluster barrier, every block
adds up the results of all blocks in the same order, so all blocks choose the same part. There is one cluster barrier
per round.

Half of all ranks are of numbers next to 0, where the cutoff is seldom. For top-p the first rounds therefore divide the
interval into equal parts of logits instead of ranks. The search for top-p begins with the round that sums all weights:
two of its thresholds narrow the interval.
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

FIRST_OFFSETS = 5.0, 10.0
"""Distances in scaled logits from the largest logit to the thresholds of the round that sums all weights."""

ROUNDS_BY_VALUE = 2
"""Rounds of the search for top-p with thresholds at equal distances of logits. `FIRST_OFFSETS` usually leave an
interval of 5 scaled logits, and two such rounds .3."""

TOP_K, MASS, TOP_P, TOTAL, DONE = range(5)
"""Stages of the search.

TOP_K searches for the cutoff of top-k. MASS sums the weights of the logits that top-k keeps. TOP_P searches for the
cutoff of top-p. TOTAL sums the weights of the logits that all filters keep, unless a round before has done so.
"""


class _State(NamedTuple):
    """State of the search.

    Attributes:
      stage: The stage.
      low, high: Interval `[low, high)` of ranks that contains the cutoff of the stage.
      low_logit, high_logit: Logits of these ranks, the latter at most the largest logit.
      low_sum: Result for `low` as threshold; -1 if it has not been one in this stage.
      by_value: Number of further rounds with thresholds at equal distances.
      cutoff: Largest cutoff of the stages that are complete.
      required: Count (top-k) or sum of weights (top-p) that the logits at or above the cutoff of the stage must reach.
      total: Result of the last round for its first threshold.
      buffer: Buffer of `Exchange.sums` that the next round writes, 0 or 1.
    """

    stage: Any
    low: Any
    high: Any
    low_logit: Any
    high_logit: Any
    low_sum: Any
    by_value: Any
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
    slices.store_slice(part)
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
        in_mass = state.stage == MASS
        pivots, thresholds = _pivots(state, shift)
        if limits.top_p is None:
            thresholds = [jnp.where(searching, threshold, state.cutoff) for threshold in thresholds]
        else:
            first_pivots, first_thresholds = _first_pivots(limits, largest, state.cutoff, shift)
            for i, (pivot, threshold) in enumerate(zip(first_pivots, first_thresholds, strict=True)):
                pivots[i] = jnp.where(in_mass, pivot, pivots[i])
                thresholds[i] = jnp.where(searching, thresholds[i], jnp.where(in_mass, threshold, state.cutoff))
        sums = _sums_above(part, exchange_sums, thresholds, largest, rate, state.stage == TOP_K, state.buffer)
        required, low, high, low_sum = state.required, state.low, state.high, state.low_sum
        low_logit, high_logit, by_value = state.low_logit, state.high_logit, state.by_value - 1
        if limits.top_p is not None:
            mass = sums[0]
            required = jnp.where(in_mass, limits.top_p * mass, required)
            start = jnp.maximum(_top_p_start(limits, largest, mass, part.vocab_size), state.cutoff)
            start = _scalar(lambda x: _rank(x, shift), jnp.maximum(start, LOWEST))
            # With top_p = 0 only the largest logit is kept.
            start = jnp.where(limits.top_p > 0, jnp.minimum(start, end - 1), end - 1)
            start_logit = _scalar(lambda r: _unrank(r, shift), start)
            low, high = jnp.where(in_mass, start, low), jnp.where(in_mass, end, high)
            low_logit = jnp.where(in_mass, start_logit, low_logit)
            high_logit = jnp.where(in_mass, largest, high_logit)
            low_sum = jnp.where(in_mass, -1.0, low_sum)
            # Not from the lowest number, from which equal parts would be too long.
            by_value = jnp.where(in_mass, jnp.where(start > lowest, ROUNDS_BY_VALUE, 0), by_value)
        for pivot, threshold, total in zip(pivots, thresholds, sums, strict=True):
            reaches = total >= required
            raises, lowers = reaches & (pivot > low) & (pivot < high), ~reaches & (pivot < high) & (pivot > low)
            low, high = jnp.where(raises, pivot, low), jnp.where(lowers, pivot, high)
            low_logit, high_logit = jnp.where(raises, threshold, low_logit), jnp.where(lowers, threshold, high_logit)
            low_sum = jnp.where(raises, total, low_sum)
        converged = searching & (low + 1 >= high)
        # The next stage.
        after_top_k = jnp.where(uses_top_p, MASS, TOTAL)
        stage = jnp.where((state.stage == TOP_K) & converged, after_top_k, state.stage)
        stage = jnp.where(in_mass, TOP_P, stage)
        stage = jnp.where((state.stage == TOP_P) & converged, TOTAL, stage)
        stage = jnp.where(state.stage == TOTAL, DONE, stage)
        cutoff = jnp.where(converged, jnp.maximum(state.cutoff, low_logit), state.cutoff)
        begins_total = (stage == TOTAL) & (state.stage != TOTAL)
        cutoff = jnp.where(begins_total, finish(cutoff), cutoff)
        # The sum of the kept weights may be known: that of the last threshold.
        is_summed = begins_total & (state.stage == TOP_P) & (low_sum >= 0) & (cutoff == low_logit)
        total = jnp.where(is_summed, low_sum, sums[0])
        stage = jnp.where(is_summed, DONE, stage)
        search = low, high, low_logit, high_logit, low_sum, by_value
        return _State(stage, *search, cutoff, required, total, 1 - state.buffer)

    top_k = jnp.float32(0) if limits.top_k is None else jnp.asarray(limits.top_k).astype(jnp.float32)
    low = jnp.minimum(jnp.maximum(_scalar(lambda x: _rank(x, shift), top_k_bound), lowest), end - 1)
    stage = jnp.where(uses_top_k, TOP_K, jnp.where(uses_top_p, MASS, TOTAL))
    cutoff = jnp.float32(-jnp.inf)
    cutoff = jnp.where(stage == TOTAL, finish(cutoff), cutoff)
    logits = _scalar(lambda r: _unrank(r, shift), low), largest
    zeros = jnp.float32(0), jnp.int32(0)
    state = _State(stage, low, end, *logits, jnp.float32(-1), jnp.int32(0), cutoff, top_k, *zeros)
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
        jnp.sum(slices.load_per_block(exchange_sums, (part.row, buffer, i), part, 0.0)) for i in range(len(thresholds))
    ]


def _pivots(state: _State, shift: int) -> tuple[list[jax.Array], list[jax.Array]]:
    """Ranks inside `[low, high)` that divide it into parts of about equal size, and their logits."""
    num_parts = NUM_THRESHOLDS + 1
    number = tiling.lane_index(config.MIN_LANES) + 1
    # Divided before the subtraction, because high - low can overflow int32.
    step = jnp.maximum(state.high // num_parts - state.low // num_parts, 1)
    by_rank = state.low + step * number
    # Weighted before the subtraction, likewise.
    share = number.astype(jnp.float32) * (1 / num_parts)
    by_value = _rank(state.low_logit * (1 - share) + state.high_logit * share, shift)
    use_value = jnp.where(state.by_value > 0, 0, config.MIN_LANES + 1)
    ranks = jnp.where(number > use_value, jnp.maximum(by_value, state.low + 1), by_rank)
    ranks = jnp.minimum(ranks, jnp.maximum(state.high - 1, state.low))
    logits = _unrank(ranks, shift)

    def scalars(vector, lowest):
        return [jnp.max(jnp.where(number == i, vector, lowest)) for i in range(1, num_parts)]

    return scalars(ranks, -(2**31)), scalars(logits, -jnp.inf)


def _first_pivots(limits: RowLimits, largest: Any, cutoff: Any, shift: int) -> tuple[list[Any], list[Any]]:
    """Ranks and logits of the thresholds of stage MASS: the cutoff of top-k, and two that may bound that of top-p."""
    pivots, thresholds = [jnp.int32(-(2**31))], [cutoff]
    for offset in FIRST_OFFSETS:
        x = largest - (offset if limits.scale is None else offset / limits.scale)
        pivots.append(_scalar(lambda x: _rank(x, shift), jnp.maximum(jnp.maximum(x, cutoff), LOWEST)))
        thresholds.append(_scalar(lambda r: _unrank(r, shift), pivots[-1]))
    return pivots, thresholds


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
