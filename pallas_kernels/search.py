"""The search of a whole row for its cutoff, where candidates are too many to be listed.

Three thresholds a round cut the interval of possible cutoffs, floating-point numbers in their order, into four. Each
block counts or adds up its share of the row, and the cluster meets once a round; all blocks then decide alike.
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
"""Margin, in scaled logits, by which the search for top-p starts lower than exact arithmetic needs."""


TOP_K, MASS, TOP_P, TOTAL, DONE = range(5)
"""Stages: the cutoff of top-k; the mass above it; the cutoff of top-p; the mass of what is kept."""


class _State(NamedTuple):
    """The stage; the interval `[low, high)` of ranks that the cutoff lies in; cutoffs and sums that are known."""

    stage: Any
    low: Any
    high: Any
    cutoff: Any
    wanted: Any
    total: Any
    turn: Any


def search(part: Slice, limits: RowLimits, exchanged: Any, largest: Any, first: Any) -> Kept:
    """The cutoff and the sum by passes over the row in registers; `first` is not above the cutoff of top-k.

    The blocks leave sums for each other in `exchanged`, of `Exchange.sums`.
    """
    for i, x in enumerate(part.tiles):
        scan.store_sums(part.shared.at[i], x)
    shift, rate = _shift(part.dtype), exp2_rate(limits.scale)
    end = _scalar(lambda x: _rank(x, shift), largest) + 1
    lowest = _scalar(lambda x: _rank(x, shift), jnp.float32(LOWEST))
    by_top_k = by_top_p = jnp.bool_(False)
    if limits.top_k is not None:
        by_top_k = jnp.bool_((limits.top_k > 0) & (limits.top_k < part.vocab_size))
    if limits.top_p is not None:
        by_top_p = jnp.bool_(limits.top_p < 1)

    def finish(cutoff):
        """The cutoff of all three."""
        if limits.min_p is not None:
            cutoff = jnp.maximum(cutoff, min_p_cutoff(largest, limits))
        return jnp.minimum(cutoff, largest)

    def body(state: _State) -> _State:
        searching = (state.stage == TOP_K) | (state.stage == TOP_P)
        pivots = _pivots(state.low, state.high)
        thresholds = [
            jnp.where(searching, _scalar(lambda r: _unrank(r, shift), pivot), state.cutoff) for pivot in pivots
        ]
        sums = _sums_above(part, exchanged, thresholds, largest, rate, state.stage == TOP_K, state.turn)
        low, high = state.low, state.high
        for pivot, total in zip(pivots, sums, strict=True):
            low = jnp.where(total >= state.wanted, jnp.maximum(low, pivot), low)
            high = jnp.where(total >= state.wanted, high, jnp.minimum(high, pivot))
        found = _scalar(lambda r: _unrank(r, shift), low)
        over = low + 1 >= high
        # What follows each stage.
        after_top_k = jnp.where(by_top_p, MASS, TOTAL)
        stage = jnp.where(state.stage == TOP_K, jnp.where(over, after_top_k, TOP_K), state.stage)
        stage = jnp.where(state.stage == MASS, TOP_P, stage)
        stage = jnp.where((state.stage == TOP_P) & over, TOTAL, stage)
        stage = jnp.where(state.stage == TOTAL, DONE, stage)
        cutoff = jnp.where(searching & over, jnp.maximum(state.cutoff, found), state.cutoff)
        cutoff = jnp.where((stage == TOTAL) & (state.stage != TOTAL), finish(cutoff), cutoff)
        wanted = state.wanted
        if limits.top_p is not None:
            mass = sums[0]
            wanted = jnp.where(state.stage == MASS, limits.top_p * mass, wanted)
            start = _top_p_start(limits, largest, mass, part.vocab_size)
            start = _scalar(lambda x: _rank(x, shift), jnp.maximum(start, LOWEST))
            floor = _scalar(lambda x: _rank(x, shift), jnp.maximum(cutoff, LOWEST))
            begin = jnp.minimum(jnp.maximum(start, floor), end - 1)
            # Of no mass at all the largest logit is enough.
            begin = jnp.where(limits.top_p > 0, begin, end - 1)
            low, high = jnp.where(state.stage == MASS, begin, low), jnp.where(state.stage == MASS, end, high)
        return _State(stage, low, high, cutoff, wanted, sums[0], 1 - state.turn)

    top_k = jnp.float32(0) if limits.top_k is None else jnp.asarray(limits.top_k).astype(jnp.float32)
    low = jnp.maximum(_scalar(lambda x: _rank(x, shift), first), lowest)
    stage = jnp.where(by_top_k, TOP_K, jnp.where(by_top_p, MASS, TOTAL))
    cutoff = jnp.float32(-jnp.inf)
    cutoff = jnp.where(stage == TOTAL, finish(cutoff), cutoff)
    state = _State(stage, jnp.minimum(low, end - 1), end, cutoff, top_k, jnp.float32(0), jnp.int32(0))
    state = lax.while_loop(lambda state: state.stage < DONE, body, state)
    return Kept(largest, state.cutoff, state.total, None)


def _top_p_start(limits: RowLimits, largest: Any, mass: Any, vocab_size: int) -> jax.Array:
    """Lower bound of the cutoff of top-p.

    V logits below `largest + log((1 - p) mass / V) / scale` have less than the mass `(1 - p) mass` that may go.
    """
    rest = 1 - limits.top_p
    below = jnp.log(rest * mass / vocab_size) - SLACK
    below = below if limits.scale is None else below / limits.scale
    # A margin that float32 sums of the mass cannot use up.
    return jnp.where(rest > 2.0**-10, largest + below, LOWEST)


def _sums_above(part, exchanged, thresholds, largest, rate, counting, turn) -> list[jax.Array]:
    """Over the row, for each threshold, how many logits reach it, or the sum of their exponentials."""
    # Every weight is one at a rate of zero; of -inf it is no number, and no threshold lets it in.
    rate = jnp.where(counting, 0.0, rate)

    def add(i, sums):
        # Shared memory -> registers: [TILE].
        x = plgpu.load(part.shared.at[i], layout=part.layout, optimized=False).astype(jnp.float32)
        weight = jnp.exp2((x - largest) * rate)
        each = [jnp.where(x >= threshold, weight, 0.0) for threshold in thresholds]
        return tuple(a + b for a, b in zip(sums, each, strict=True))

    zero = plgpu.layout_cast(jnp.zeros((TILE,), jnp.float32), part.layout)
    sums = lax.fori_loop(0, len(part.tiles), add, (zero,) * len(thresholds))
    of_block = scan.to_scalars(scan.sum_vectors(list(sums), part.vec), part.vec)
    for i, one in enumerate(of_block):
        exchanged[part.row, turn, i, part.block] = one
    slices.meet(part)
    return [jnp.sum(slices.of_blocks(exchanged.at[part.row, turn, i], part, 0.0)) for i in range(len(thresholds))]


def _pivots(low: Any, high: Any) -> list[jax.Array]:
    """Ranks that cut `[low, high)` into about equal parts, each inside."""
    # Half of the difference of two ranks is a number of 32 bits.
    parts = NUM_THRESHOLDS + 1
    step = jnp.maximum(high // parts - low // parts, 1)
    return [jnp.minimum(low + step * i, jnp.maximum(high - 1, low)) for i in range(1, parts)]


def _shift(dtype: Any) -> int:
    """Low bits of a float32 that are zero for every number of this type."""
    return {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}.get(jnp.dtype(dtype), 0)


def _rank(x: jax.Array, shift: int) -> jax.Array:
    """The place of float32 numbers in their order, as integers: neighbours that differ by `2**shift` bits by one."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits >= 0, bits, jnp.int32(-(2**31)) - bits) >> shift


def _unrank(rank: jax.Array, shift: int) -> jax.Array:
    """The numbers at these places."""
    bits = rank << shift
    return lax.bitcast_convert_type(jnp.where(bits >= 0, bits, jnp.int32(-(2**31)) - bits), jnp.float32)


def _scalar(fn: Any, value: Any) -> jax.Array:
    """`fn` of a scalar: a cast of its bits exists for vectors only."""
    wide = jnp.full((config.MIN_LANES,), value)
    return jnp.max(fn(plgpu.layout_cast(wide, tiling.lane_layout(config.MIN_LANES))))


def round_down(x: Any, dtype: Any) -> jax.Array:
    """A number of this type that is at most x, and finite."""
    shift = _shift(dtype)
    lower = _scalar(lambda x: _unrank(_rank(x, shift), shift), x)
    if dtype == jnp.float16:
        # Subnormal numbers have fewer bits.
        lower = jnp.where(jnp.abs(lower) >= 2.0**-14, lower, jnp.where(lower >= 0, 0.0, -(2.0**-14)))
    return jnp.maximum(lower, float(jnp.finfo(dtype).min))
