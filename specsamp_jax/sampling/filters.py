"""Temperature, top-k, top-p and min-p as one scale and one cutoff a row.

All four keep the largest logits and rescale them, so a row of filtered logits is never written: it is the
row itself, a number to multiply it by, and the smallest logit that is kept.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import Filter, SamplingParams
from specsamp_jax.sampling.cutoff import largest_logits, largest_threshold, mass_above, running_mass
from specsamp_jax.sampling.mesh_axes import cond, vary_like
from specsamp_jax.sampling.reduce import map_rows, row_max, wide


def is_number(value: Any, number: int | float) -> bool:
    """Whether a parameter is this number for certain, while the program is being traced."""
    return isinstance(value, int | float | np.generic) and bool(value == number)


def call_unfiltered_if_off(fn: Callable[..., Any], *samplings: SamplingParams | None, vocab_size: int) -> Any:
    """Returns `fn(*samplings)`, by a program without filters if no parameter changes the logits of any row.

    The scale alone costs a CPU a third of a row's logsumexp. A row has the same bits in both programs if its filters
    are off: a scale of 1 is exact, and a row without a cutoff keeps the sum over all of it.

    A call on a CPU begins with an object for each buffer of the program, also of branches that do not run: about 100
    nanoseconds per buffer in jaxlib 0.12. Reductions have the most: each has three scalars for the function that it
    applies, an `argmax` and each `top_k` have eleven. So filters share searches and draws where they can.

    Args:
      fn: A function of sampling parameters, each None for no filter. Its results have the same types with any of them.
      samplings: The parameters of the call, with a `top_k` of int32 if it is an array.
      vocab_size: V; a `top_k` from V on is off.
    """
    on = [flag for sampling in samplings if sampling is not None for flag in _changes(sampling, vocab_size)]
    if any(flag is True for flag in on):
        return fn(*samplings)
    off = (None,) * len(samplings)
    traced = [flag for flag in on if not isinstance(flag, bool)]
    if not traced:
        return fn(*off)
    return cond(jnp.any(functools.reduce(jnp.logical_or, traced)), lambda: fn(*samplings), lambda: fn(*off))


def _changes(sampling: SamplingParams, vocab_size: int) -> list[bool | Bool[Array, "*B"]]:
    """Whether each parameter changes logits: a bool of a Python number, a flag per row of an array."""
    flags = (
        # NaN is greedy.
        (sampling.temperature, lambda value: value != 1),
        (sampling.top_k, lambda value: (value > 0) & (value < vocab_size)),
        (sampling.top_p, lambda value: value < 1),
        (sampling.min_p, lambda value: value > 0),
    )
    return [
        bool(changes(value)) if isinstance(value, int | float | np.generic) else changes(jnp.asarray(value))
        for value, changes in flags
    ]


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

    none_off = (sampling.top_k, 0), (sampling.top_p, 1.0), (sampling.min_p, 0.0)
    needs_cutoff = not all(is_number(value, off) for value, off in none_off)
    return Filter(scale, _cutoffs(logits, scale, sampling) if needs_cutoff else None, greedy)


def _cutoffs(
    logits: Float[Array, "B R V"], scale: Float[Array, "B"] | None, sampling: SamplingParams
) -> Float[Array, "B R"]:
    """The smallest logit that top-k, then top-p, then min-p keep of each row; -inf where all are kept."""
    _, num_rows, vocab_size = logits.shape
    dtype = wide(logits[:0]).dtype
    # Like the logits, so that it varies over the mesh axes that they vary over.
    off = jnp.full_like(logits[..., 0], -jnp.inf, dtype=dtype)
    if num_rows == 0:
        return off
    scale = jnp.ones_like(off) if scale is None else jnp.broadcast_to(scale[:, None], off.shape)

    def per_row(value, dtype):
        return jnp.broadcast_to(jnp.asarray(value, dtype).reshape(-1, 1), off.shape)

    # A narrower type than int32 would wrap where it is compared with V.
    top_k = per_row(sampling.top_k, jnp.int32)
    top_p, min_p = (per_row(value, dtype) for value in (sampling.top_p, sampling.min_p))
    uses_top_k, uses_top_p, uses_min_p = (top_k > 0) & (top_k < vocab_size), top_p < 1, min_p > 0

    def filtered():
        if is_number(sampling.top_k, 0) and is_number(sampling.top_p, 1.0):
            cutoff, largest = off, map_rows(lambda row: wide(row_max(row, vocab_size)), logits)
        else:
            values = largest_logits(logits)
            largest = values[..., 0]
            cutoff = _top_k_top_p(logits, values, scale, top_k, top_p, sampling)
        # p >= min_p * max p, where p is exp(scale * logit) over a constant. log 0 = -inf: off, and so is NaN.
        cutoff = jnp.maximum(cutoff, largest + jnp.log(jnp.where(uses_min_p, min_p, 0)) / scale)
        # Never above the largest, whatever the rounding: a row keeps its most probable token.
        return jnp.where(jnp.isfinite(largest), jnp.minimum(cutoff, largest), off)

    return cond((uses_top_k | uses_top_p | uses_min_p).any(), filtered, lambda: off)


class _Search(NamedTuple):
    """Arguments of `largest_threshold` after the logits and the largest of them."""

    scale: Float[Array, "B R"]
    wanted: Float[Array, "B R"]
    floor: Float[Array, "B R"]
    above_floor: Float[Array, "B R"]
    active: Bool[Array, "B R"]


def _top_k_top_p(
    logits: Float[Array, "B R V"],
    values: Float[Array, "B R n"],
    scale: Float[Array, "B R"],
    top_k: Int[Array, "B R"],
    top_p: Float[Array, "B R"],
    sampling: SamplingParams,
) -> Float[Array, "B R"]:
    """The smallest logit that top-k, then top-p keep, found among the largest logits if it is one of them.

    Where top-k keeps more, or top-p does of a row that top-k does not cut to fewer, the row itself is searched. With a
    `top_k` that is a Python number from 1 to `NUM_LARGEST`, no search is in the program.
    """
    vocab_size, size = logits.shape[-1], values.shape[-1]
    largest, smallest = values[..., 0], values[..., -1]
    everything = jnp.full_like(largest, -jnp.inf)
    uses_top_k, uses_top_p = (top_k > 0) & (top_k < vocab_size), top_p < 1
    whole_row = size == vocab_size
    k = sampling.top_k
    always_short = whole_row or (isinstance(k, int | np.integer) and 0 < k <= size)
    varying = logits, scale, top_k, top_p

    short = uses_top_k & (top_k <= size)
    kth = jnp.where(jnp.arange(size) < top_k[..., None], values, jnp.inf).min(-1)
    floor = jnp.where(short, kth, everything)

    def by_top_k(floor):
        count, all_logits = top_k.astype(largest.dtype), jnp.full_like(largest, vocab_size)
        return _Search(jnp.zeros_like(scale), count, floor, all_logits, uses_top_k & ~short), floor

    def by_top_p(floor):
        sums = running_mass(values, largest, scale)
        # Those that were left out are at most `smallest`: below the floor, or without mass.
        complete = jnp.full_like(short, True) if whole_row else (smallest < floor) | (smallest == -jnp.inf)
        mass = jnp.where(values >= floor[..., None], sums, 0).max(-1)
        if not whole_row:
            reads, mass_found = uses_top_p & ~complete, mass

            def read_rows():
                return jnp.where(reads, mass_above(logits, floor, largest, scale, reads), mass_found)

            mass = cond(reads.any(), read_rows, lambda: mass_found)
        wanted = top_p * mass
        found = jnp.where(sums >= wanted[..., None], values, -jnp.inf).max(-1)
        cutoff = jnp.where(uses_top_p, jnp.maximum(floor, found), floor)
        beyond = uses_top_p & (found == -jnp.inf) & ~short & ~complete
        return _Search(scale, wanted, floor, mass, beyond), cutoff

    def search(inputs: _Search, cutoff):
        def searched():
            return jnp.where(inputs.active, largest_threshold(logits, values, *inputs), cutoff)

        return cond(inputs.active.any(), searched, lambda: cutoff)

    has_top_k, has_top_p = not is_number(k, 0), not is_number(sampling.top_p, 1.0)
    if always_short:
        return by_top_p(floor)[1] if has_top_p else floor
    if not (has_top_k and has_top_p):
        return search(*(by_top_k if has_top_k else by_top_p)(floor))

    def narrow(i, cutoff):
        # One search in the program for both filters: each buffer of a program costs a CPU time, used or not.
        inputs = cond(i == 0, lambda: by_top_k(cutoff), lambda: by_top_p(cutoff))
        return vary_like(search(*inputs), varying)

    return lax.fori_loop(0, 2, narrow, vary_like(floor, varying))
