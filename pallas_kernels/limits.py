"""Sampling parameters inside a kernel: each is a number that is fixed at compile time, or an array in global memory."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Limits(NamedTuple):
    """Sampling parameters, each a Python number or an array `[B]`. See `specsamp_jax.SamplingParams`."""

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0


class RowLimits(NamedTuple):
    """Sampling parameters of one row. A field is None if a compile-time number turns its filter off for all rows.

    Attributes:
      scale: Multiplies the logits: 1 / temperature, or 1 in a greedy row. None: 1.
      greedy: Whether the row is greedy: its temperature is NaN or below the smallest normal float32. None: no row is.
      top_k: Number of logits to keep. A value of 0 or below, or from V on, turns the filter off.
      top_p: Probability to keep; 1 turns the filter off.
      min_p: Smallest kept probability, relative to the largest; 0 turns the filter off.
    """

    scale: Any
    greedy: Any
    top_k: Any
    top_p: Any
    min_p: Any


def static_limits(limits: Limits) -> Limits:
    """The parameters that are numbers; None in place of arrays."""
    return Limits(*(value if isinstance(value, int | float | np.generic) else None for value in limits))


def array_limits(limits: Limits, batch_size: int) -> Limits:
    """The parameters that are arrays, `[B]`, as float32 or int32 (`top_k`); None in place of numbers."""

    def array(name, value, number):
        if number is not None:
            return None
        return jnp.broadcast_to(jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32), (batch_size,))

    return Limits(*map(array, Limits._fields, limits, static_limits(limits)))


def maybe_on(limits: Limits) -> Limits:
    """The parameters, with None in place of numbers that turn their filter off."""
    static = static_limits(limits)
    return Limits(*(None if n == off else x for x, n, off in zip(limits, static, Limits(), strict=True)))


def row_limits(static: Limits, arrays: Limits, sequence: Any) -> RowLimits:
    """The parameters of one row, inside a kernel: from `static_limits`, and from `array_limits` at index `sequence`."""

    def value(name, off):
        number, array = getattr(static, name), getattr(arrays, name)
        if array is not None:
            return array[sequence]
        return None if number == off else number

    tiny = float(jnp.finfo(jnp.float32).tiny)
    scale, greedy = value("temperature", 1.0), None
    if arrays.temperature is not None:
        temperature = arrays.temperature[sequence]
        greedy = ~(temperature >= tiny)
        scale = jnp.where(greedy, 1.0, jnp.maximum(1 / temperature, tiny))
    elif scale is not None:
        greedy = None if np.float32(scale) >= tiny else True
        scale = 1.0 if greedy else float(np.maximum(np.float32(1) / np.float32(scale), np.float32(tiny)))
    return RowLimits(scale, greedy, value("top_k", 0), value("top_p", 1.0), value("min_p", 0.0))


def keeps_all(limits: Limits) -> bool:
    """Whether all filters are off at compile time and the temperature is a number."""
    static = static_limits(limits)
    return static.temperature is not None and static[1:] == Limits()[1:]


def fixed_row_limits(limits: Limits) -> RowLimits:
    """The parameters that are numbers, and so the same in all rows; None in place of arrays."""
    return row_limits(static_limits(limits), Limits(None, None, None, None), 0)


def min_p_cutoff(largest: Any, limits: RowLimits) -> jax.Array:
    """The smallest logit that min-p keeps in a row whose largest logit is `largest`."""
    log_min_p = jnp.log(jnp.where(limits.min_p > 0, limits.min_p, 0.0).astype(jnp.float32))
    return jnp.minimum(largest + (log_min_p if limits.scale is None else log_min_p / limits.scale), largest)
