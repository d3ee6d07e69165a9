"""Sampling parameters of a row inside a kernel: numbers that it is compiled for, or arrays that it reads."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Limits(NamedTuple):
    """Sampling parameters; each a Python number, or an array `[B]`. See `specsamp_jax.SamplingParams`."""

    temperature: Any = 1.0
    top_k: Any = 0
    top_p: Any = 1.0
    min_p: Any = 0.0


class RowLimits(NamedTuple):
    """Sampling parameters of one row; None where it is certain that one is off for all rows."""

    scale: Any
    greedy: Any
    top_k: Any
    top_p: Any
    min_p: Any


def numbers_of(limits: Limits) -> Limits:
    """The parameters that are numbers, None for those that are arrays."""
    return Limits(*(value if isinstance(value, int | float | np.generic) else None for value in limits))


def arrays_of(limits: Limits, batch_size: int) -> Limits:
    """The parameters that are arrays, `[B]`, None for those that are numbers."""

    def array(name, value, number):
        if number is not None:
            return None
        return jnp.broadcast_to(jnp.asarray(value, jnp.int32 if name == "top_k" else jnp.float32), (batch_size,))

    return Limits(*map(array, Limits._fields, limits, numbers_of(limits)))


def maybe_on(limits: Limits) -> Limits:
    """The parameters, None for those that are certainly off."""
    numbers = numbers_of(limits)
    return Limits(*(None if n == off else x for x, n, off in zip(limits, numbers, Limits(), strict=True)))


def row_limits(numbers: Limits, arrays: Limits, sequence: Any) -> RowLimits:
    """The parameters of one row, inside a kernel."""

    def value(name, off):
        number, array = getattr(numbers, name), getattr(arrays, name)
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


def min_p_cutoff(largest: Any, limits: RowLimits) -> jax.Array:
    """Cutoff of min-p alone in a row whose largest logit is `largest`."""
    below = jnp.log(jnp.where(limits.min_p > 0, limits.min_p, 0.0).astype(jnp.float32))
    return jnp.minimum(largest + (below if limits.scale is None else below / limits.scale), largest)
