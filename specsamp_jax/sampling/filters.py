"""Temperature, top-k, top-p and min-p as one scale and one cutoff a row.

All four keep the largest logits and rescale them, so a row of filtered logits is never written: it is the
row itself, a number to multiply it by, and the smallest logit that is kept.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from specsamp_jax._types import Filter, SamplingParams
from specsamp_jax.sampling.reduce import map_rows, row_max, row_sum, wide


def is_number(value: Any, number: int | float) -> bool:
    """Whether a parameter is this number for certain, while the program is being traced."""
    return isinstance(value, int | float | np.generic) and bool(value == number)


def make_filter(logits: Float[Array, "B R V"], sampling: SamplingParams | None) -> Filter:
    """The filter that `sampling` makes of these rows.

    Parameters given as Python numbers that switch a filter off cost nothing; given as arrays, a filter that
    is off for every row costs one comparison when the program runs.
    """
    if sampling is None:
        return Filter()
    batch_size = logits.shape[0]
    dtype = wide(logits[:0]).dtype
    scale, greedy = None, None
    if not is_number(sampling.temperature, 1.0):
        # The smallest normal number has a finite reciprocal, and so has the largest; below it XLA flushes to 0.
        tiny = float(jnp.finfo(dtype).tiny)
        temperature = jnp.broadcast_to(jnp.asarray(sampling.temperature, dtype), (batch_size,))
        greedy = ~(temperature >= tiny)
        scale = jnp.where(greedy, 1, jnp.maximum(1 / temperature, tiny))
        if isinstance(sampling.temperature, int | float) and sampling.temperature >= tiny:
            greedy = None

    def cutoff(row: Float[Array, "B V"]) -> Float[Array, "B"]:
        return _cutoff(row, scale, sampling)

    none_off = (sampling.top_k, 0), (sampling.top_p, 1.0), (sampling.min_p, 0.0)
    needs_cutoff = not all(is_number(value, off) for value, off in none_off)
    return Filter(scale, map_rows(cutoff, logits) if needs_cutoff else None, greedy)


def _cutoff(
    logits: Float[Array, "B V"], scale: Float[Array, "B"] | None, sampling: SamplingParams
) -> Float[Array, "B"]:
    """The smallest logit that top-k, then top-p, then min-p keep of each row."""
    batch_size, vocab_size = logits.shape
    dtype = wide(logits[:0]).dtype
    largest = wide(row_max(logits, vocab_size))
    scale = jnp.ones((batch_size,), dtype) if scale is None else scale
    cutoff = off = jnp.full((batch_size,), -jnp.inf, dtype)

    def kept(threshold: Float[Array, "B"]) -> Bool[Array, "B V"]:
        return wide(logits) >= threshold[:, None]

    def mass(threshold: Float[Array, "B"]) -> Float[Array, "B"]:
        weights = jnp.exp((wide(logits) - largest[:, None]) * scale[:, None])
        return row_sum(jnp.where(kept(threshold), weights, 0), vocab_size)

    if not is_number(sampling.top_k, 0):
        top_k = jnp.broadcast_to(jnp.asarray(sampling.top_k), (batch_size,))
        active = (top_k > 0) & (top_k < vocab_size)

        def of_top_k():
            return _largest_threshold(logits, lambda t, count: count >= top_k, active)

        cutoff = lax.cond(active.any(), of_top_k, lambda: off)

    if not is_number(sampling.top_p, 1.0):
        top_p = jnp.broadcast_to(jnp.asarray(sampling.top_p, dtype), (batch_size,))
        active = top_p < 1

        def of_top_p(floor: Array) -> Array:
            wanted = top_p * mass(floor)
            return jnp.maximum(floor, _largest_threshold(logits, lambda t, count: mass(t) >= wanted, active))

        cutoff = lax.cond(active.any(), of_top_p, lambda floor: floor, cutoff)

    if not is_number(sampling.min_p, 0.0):
        min_p = jnp.broadcast_to(jnp.asarray(sampling.min_p, dtype), (batch_size,))
        # p >= min_p * max p, where p is exp(scale * logit) over a constant. log 0 = -inf: off, and so is NaN.
        cutoff = jnp.maximum(cutoff, largest + jnp.log(jnp.where(min_p > 0, min_p, 0)) / scale)
    # Never above the largest, whatever the rounding: a row keeps its most probable token.
    return jnp.minimum(cutoff, largest)


def _largest_threshold(
    logits: Float[Array, "B V"],
    enough: Callable[[Float[Array, "B"], Array], Bool[Array, "B"]],
    active: Bool[Array, "B"],
) -> Float[Array, "B"]:
    """The largest threshold at which what is kept is still enough, by bisection; -inf where not active.

    `enough(threshold, count kept)` must hold at the smallest finite logit and, once it fails, fail at all
    larger thresholds. The bisection is over the logits' own floating-point numbers in their order, and ends
    where the interval holds one of them, or one logit; nothing is sorted or written.
    """
    finite = jnp.isfinite(logits)
    low = _rank(jnp.where(finite, logits, jnp.inf).min(-1))
    high = _rank(jnp.where(finite, logits, -jnp.inf).max(-1)) + 1
    vocab_size = logits.shape[-1]

    def midpoint(low, high, step):
        # The middle value is soon among the logits; the middle rank halves any interval, however it lies.
        value = wide(_unrank(low, logits.dtype)) / 2 + wide(_unrank(high, logits.dtype)) / 2
        middle = (low & high) + ((low ^ high) >> 1)
        return jnp.where(step < 16, jnp.clip(_rank(value.astype(logits.dtype)), low + 1, high - 1), middle)

    def open_(state):
        low, high, above_low, above_high, _ = state
        return active & (above_low - above_high > 1) & (high - 1 > low)

    def body(state):
        low, high, above_low, above_high, step = state
        going = open_(state)
        middle = midpoint(low, high, step)
        threshold = wide(_unrank(middle, logits.dtype))
        count = (wide(logits) >= threshold[:, None]).sum(-1)
        ok = enough(threshold, count)
        up, down = going & ok, going & ~ok
        return (
            jnp.where(up, middle, low),
            jnp.where(down, middle, high),
            jnp.where(up, count, above_low),
            jnp.where(down, count, above_high),
            step + 1,
        )

    counts = jnp.full(low.shape, vocab_size), jnp.zeros(low.shape, int)
    low, *_ = lax.while_loop(lambda s: open_(s).any(), body, (low, high, *counts, 0))
    return jnp.where(active, wide(_unrank(low, logits.dtype)), -jnp.inf)


def _rank(values: Array) -> Array:
    """The place of floating-point numbers in their order, as integers: neighbours differ by one."""
    bits = lax.bitcast_convert_type(values, jnp.dtype(f"int{8 * values.dtype.itemsize}"))
    return jnp.where(bits >= 0, bits, jnp.iinfo(bits.dtype).min - bits)


def _unrank(ranks: Array, dtype: DTypeLike) -> Array:
    """The floating-point numbers at these places."""
    return lax.bitcast_convert_type(jnp.where(ranks >= 0, ranks, jnp.iinfo(ranks.dtype).min - ranks), dtype)
