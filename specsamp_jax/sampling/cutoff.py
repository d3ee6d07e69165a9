"""Search for the smallest kept logit of a row: the largest values through tile maxima, and bisection in few passes."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from specsamp_jax.sampling.mesh_axes import cond, vary_like
from specsamp_jax.sampling.reduce import map_rows, row_sum, wide

NUM_LARGEST = 128
"""Number of a row's largest logits that are sorted. Checkpoints ship a top_k of 20 to 64, and of a trained model's
logits a top_p of .8 to .95 mostly keeps fewer; where it keeps more, `largest_threshold` searches the whole row."""

TILE_WIDTH = 32
"""Logits per tile maximum: near sqrt(V / NUM_LARGEST), where sorting the maxima costs as much as sorting the logits of
the chosen tiles."""

NUM_VALUE_STEPS = 8
"""Steps of the search that choose pivots by value and mass, before those that cut the interval of ranks in four."""


def largest_logits(logits: Float[Array, "*B V"], below: Float[Array, "*B"] | None = None) -> Float[Array, "*B n"]:
    """Returns the min(`NUM_LARGEST`, V) largest logits of each row, descending, in the type of the arithmetic.

    The n largest logits lie in the n tiles with the largest maxima, ties broken in any way: those tiles hold n logits
    not below the least of their maxima, and no other tile holds a larger one. Their values are therefore exact.

    Args:
      logits: The rows.
      below: If not None, logits not below this count as -inf.
    """
    vocab_size = logits.shape[-1]

    def masked(values):
        return values if below is None else jnp.where(wide(values) < below[..., None], values, -jnp.inf)

    if vocab_size <= NUM_LARGEST * TILE_WIDTH:
        return _top_k(wide(masked(logits)), min(NUM_LARGEST, vocab_size))[0]
    window = (1,) * (logits.ndim - 1) + (TILE_WIDTH,)
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, -vocab_size % TILE_WIDTH)]
    # Not a reshape: that would copy the rows on a TPU, and gather a row whose vocabulary is sharded.
    maxima = lax.reduce_window(masked(logits), -jnp.inf, lax.max, window, window, padding)
    tiles = _top_k(wide(maxima), NUM_LARGEST)[1]
    index = (tiles[..., None] * TILE_WIDTH + jnp.arange(TILE_WIDTH)).reshape(*tiles.shape[:-1], -1)
    chosen = masked(jnp.take_along_axis(logits, jnp.minimum(index, vocab_size - 1), axis=-1))
    return _top_k(wide(jnp.where(index < vocab_size, chosen, -jnp.inf)), NUM_LARGEST)[0]


def _top_k(values: Array, k: int) -> tuple[Array, Array]:
    """`lax.top_k` by selection: where a reader slices its result, XLA's CPU backend sorts all values instead."""
    largest, index = (lax.optimization_barrier(array) for array in lax.top_k(values, k))
    return largest, index


def running_mass(
    values: Float[Array, "*B n"], largest: Float[Array, "*B"], scale: Float[Array, "*B"]
) -> Float[Array, "*B n"]:
    """Mass of each row's first 1, 2, ... n values, each summed in an order that depends on its length alone."""
    # XLA's CPU backend picks its exponential by what it fuses it with; behind a barrier a row has its own bits.
    weights = jnp.where(values > -jnp.inf, jnp.exp((values - largest[..., None]) * scale[..., None]), 0)
    weights = lax.optimization_barrier(weights)
    shift, size = 1, weights.shape[-1]
    while shift < size:
        padding = [(0, 0, 0)] * (weights.ndim - 1) + [(shift, -shift, 0)]
        weights = weights + lax.pad(weights, jnp.array(0, weights.dtype), padding)
        shift *= 2
    # One more, or each reader would add all of them up again for each of its elements.
    return lax.optimization_barrier(weights)


def mass_above(
    logits: Float[Array, "B R V"],
    threshold: Float[Array, "B R"],
    largest: Float[Array, "B R"],
    scale: Float[Array, "B R"],
    active: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """Mass `sum exp((logit - largest) * scale)` of the logits not below the threshold; of active rows only."""

    def row_mass(row, threshold, largest, scale, active):
        def compute():
            weights = jnp.exp((wide(row) - largest[:, None]) * scale[:, None])
            return row_sum(jnp.where(wide(row) >= threshold[:, None], weights, 0), row.shape[-1])

        return cond(active.any(), compute, lambda: jnp.zeros_like(largest))

    return map_rows(row_mass, logits, threshold, largest, scale, active)


class Interval(NamedTuple):
    """Interval of ranks that holds a row's threshold, and the mass of the logits not below each end.

    Attributes:
      low: Rank at which the mass is enough.
      high: Rank above `low` at which it is not.
      above_low: Mass of the logits not below `low`.
      above_high: Mass of the logits not below `high`.
    """

    low: Array
    high: Array
    above_low: Float[Array, "B R"]
    above_high: Float[Array, "B R"]


def max_steps(dtype: DTypeLike) -> int:
    """The most steps that `largest_threshold` takes over logits of this type: 16 of 16 bits, 24 of 32, 40 of 64."""
    return NUM_VALUE_STEPS + 4 * jnp.dtype(dtype).itemsize


def largest_threshold(
    logits: Float[Array, "B R V"],
    values: Float[Array, "B R n"],
    scale: Float[Array, "B R"],
    wanted: Float[Array, "B R"],
    floor: Float[Array, "B R"],
    above_floor: Float[Array, "B R"],
    active: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """Returns the largest threshold t at which the logits not below t still have the wanted mass.

    Mass is `sum exp((logit - largest) * scale)`; of scale 0 it is the number of logits. A step reads the row once
    for each of three pivots. Once the interval holds few logits they are sorted, which ends the search. The interval
    is one of the logits' own floating-point numbers in their order, so steps are bounded whatever the logits are: see
    `max_steps`. A row's result depends on that row alone.

    Args:
      logits: The rows.
      values: Their largest logits, descending, which together lack the wanted mass.
      scale: Multiplies the logits.
      wanted: The mass to reach.
      floor: A threshold not above the answer.
      above_floor: Mass of the logits not below `floor`. If less than `wanted`, the answer is `floor`.
      active: The rows to search.

    Returns:
      The threshold, in the type of the arithmetic; `floor` where not active.
    """
    rows = logits, values, scale, wanted, floor, above_floor, active
    return lax.platform_dependent(*rows, cpu=_search_row_by_row, default=_search_all_rows)


def _search_all_rows(*rows: Array) -> Float[Array, "B R"]:
    logits, values, scale, *_ = rows
    return _search(lambda threshold, going: mass_above(logits, threshold, values[..., 0], scale, going), *rows)


def _search_row_by_row(*rows: Array) -> Float[Array, "B R"]:
    """One row of all sequences after the other, whose weights are written once: the exponential costs most on a CPU."""

    def search(index):
        row = [lax.dynamic_slice_in_dim(array, index, 1, 1) for array in rows]
        logits, values, scale, _, floor, _, active = row

        def search_row():
            def exponentials():
                return jnp.exp((wide(logits) - values[..., :1]) * scale[..., None])

            # Top-k counts: its scale is 0.
            weights = cond((scale != 0).any(), exponentials, lambda: jnp.ones_like(wide(logits)))

            def mass_fn(threshold, going):
                def compute():
                    return row_sum(jnp.where(wide(logits) >= threshold[..., None], weights, 0), logits.shape[-1])

                return cond(going.any(), compute, lambda: jnp.zeros_like(threshold))

            return _search(mass_fn, *row)

        return cond(active.any(), search_row, lambda: floor)

    return jnp.moveaxis(lax.map(search, jnp.arange(rows[0].shape[1]))[..., 0], 0, 1)


def _search(
    mass_fn: Callable[[Float[Array, "B R"], Bool[Array, "B R"]], Float[Array, "B R"]],
    logits: Float[Array, "B R V"],
    values: Float[Array, "B R n"],
    scale: Float[Array, "B R"],
    wanted: Float[Array, "B R"],
    floor: Float[Array, "B R"],
    above_floor: Float[Array, "B R"],
    active: Bool[Array, "B R"],
) -> Float[Array, "B R"]:
    """`largest_threshold`; `mass_fn(threshold, going)` is the mass of the logits not below the threshold."""
    vocab_size, dtype = logits.shape[-1], logits.dtype
    highest = float(jnp.finfo(dtype).max)
    largest, last, size = values[..., 0], values[..., -1], values.shape[-1]
    # The logits below it have less mass together than may be lost.
    by_mass = largest + jnp.log((above_floor - wanted) / vocab_size) / scale
    # Counts grow by about the same factor for each unit of logit; a quarter is added, as a tail becomes flatter.
    doubling = values[..., size // 2 - 1] - last
    by_count = last - 1.25 * doubling * jnp.log2(wanted / size)
    guess = jnp.where(scale > 0, by_mass, by_count)

    def value(rank):
        return jnp.clip(wide(_unrank(rank, dtype)), -highest, highest)

    def is_open(interval):
        return active & (interval.high - 1 > interval.low)

    def pivots(interval, step):
        low, high = value(interval.low), value(interval.high)
        middle = _mean(interval.low, interval.high)
        by_rank = _mean(interval.low, middle), middle, _mean(middle, interval.high)
        # The answer if log mass were linear between the ends, and the middle, which halves any interval.
        share = jnp.log(interval.above_low / wanted) / jnp.log(interval.above_low / interval.above_high)
        linear, width = low + (high - low) * share, high - low
        near = linear - width / 32, linear + width / 32, low / 2 + high / 2
        start = jnp.clip(guess, low, high)
        first = (start + (high - start) * (i / 3) for i in range(3))
        for rank, later, at_first in zip(by_rank, near, first, strict=True):
            by_value = _rank(jnp.where(step == 0, at_first, later).astype(dtype))
            yield jnp.clip(jnp.where(step < NUM_VALUE_STEPS, by_value, rank), interval.low + 1, interval.high - 1)

    def cut(interval, going, step):
        for pivot in pivots(interval, step):
            # Pivots that the ones before have ruled out are not read for. Sums are rounded: the ends may not cross.
            inside = going & (pivot > interval.low) & (pivot < interval.high)
            mass = mass_fn(wide(_unrank(pivot, dtype)), inside)
            up, down = inside & (mass >= wanted), inside & (mass < wanted)
            interval = Interval(
                jnp.where(up, pivot, interval.low),
                jnp.where(down, pivot, interval.high),
                jnp.where(up, mass, interval.above_low),
                jnp.where(down, mass, interval.above_high),
            )
        return interval

    def finish(interval, going):
        """Sorts the largest logits below `high`; where they are too few, moves `high` down past them."""

        def row_values(row, below, going):
            size = min(NUM_LARGEST, vocab_size)
            nothing = jnp.broadcast_to(below[:, None], (*below.shape, size))
            return cond(going.any(), lambda: largest_logits(row, below), lambda: nothing)

        values = map_rows(row_values, logits, wide(_unrank(interval.high, dtype)), going)
        sums = interval.above_high[..., None] + running_mass(values, largest, scale)
        found, last = jnp.where(sums >= wanted[..., None], values, -jnp.inf).max(-1), values[..., -1]
        low = jnp.maximum(interval.low, jnp.where(going, _rank(found.astype(dtype)), interval.low))
        moved = jnp.where(found > -jnp.inf, low, _rank(last.astype(dtype))) + 1
        beyond = jnp.where(values > last[..., None], sums, interval.above_high[..., None]).max(-1)
        moves = going & (moved < interval.high)
        return Interval(
            low,
            jnp.where(moves, jnp.maximum(moved, low + 1), interval.high),
            interval.above_low,
            jnp.where(moves, beyond, interval.above_high),
        )

    def step_fn(state):
        interval, step = state
        going = is_open(interval)
        # Each logit of the interval has at least the mass of its lower end. Sums are rounded; an
        # estimate that was wrong costs a step.
        least = jnp.exp((value(interval.low) - largest) * scale)
        few = interval.above_low - interval.above_high <= least * NUM_LARGEST
        sorts = going & few & (step < NUM_VALUE_STEPS)
        cuts = going & ~sorts
        interval = cond(cuts.any(), lambda: cut(interval, cuts, step), lambda: interval)
        interval = cond(sorts.any(), lambda: finish(interval, sorts), lambda: interval)
        return vary_like(interval, (logits, values, scale, wanted, floor, above_floor, active)), step + 1

    smallest = map_rows(lambda row: jnp.where(jnp.isfinite(row), row, jnp.inf).min(-1), logits)
    low = _rank(jnp.maximum(smallest, floor.astype(dtype)))
    interval = Interval(
        low,
        jnp.maximum(_rank(last.astype(dtype)), low) + 1,
        above_floor,
        jnp.where(values > last[..., None], running_mass(values, largest, scale), 0).max(-1),
    )
    limit = max_steps(dtype)
    interval, _ = lax.while_loop(
        lambda s: (s[1] < limit) & is_open(s[0]).any(),
        step_fn,
        (vary_like(interval, (logits, values, scale, wanted, floor, above_floor, active)), 0),
    )
    return jnp.where(active, wide(_unrank(interval.low, dtype)), floor)


def _rank(values: Array) -> Array:
    """Ranks of floating-point numbers in their order, as integers: neighbours differ by one."""
    bits = lax.bitcast_convert_type(values, jnp.dtype(f"int{8 * values.dtype.itemsize}"))
    return jnp.where(bits >= 0, bits, jnp.iinfo(bits.dtype).min - bits)


def _unrank(ranks: Array, dtype: DTypeLike) -> Array:
    """Floating-point numbers of these ranks."""
    return lax.bitcast_convert_type(jnp.where(ranks >= 0, ranks, jnp.iinfo(ranks.dtype).min - ranks), dtype)


def _mean(low: Array, high: Array) -> Array:
    """Mean of two ranks, rounded down, without overflow."""
    return (low & high) + ((low ^ high) >> 1)
