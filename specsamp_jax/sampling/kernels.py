"""Calls of the GPU kernels that sample and filter.

They return the tokens that the plain JAX cores return, and keep the same logits. Modules of kernels are imported in
functions; see `pallas_kernels.mosaic`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import config as sizes
from pallas_kernels import mosaic, random
from pallas_kernels.limits import Limits
from specsamp_jax import _checks
from specsamp_jax._types import TILE, Filter, SamplingParams
from specsamp_jax.sampling.filters import is_number, make_filter
from specsamp_jax.sampling.streams import Purpose

MAX_BATCH = 65_535
"""Maximum batch size. CUDA limits axes y and z of a grid to this size."""


def split(*samplings: SamplingParams | None) -> tuple[list[Any], list[Any]]:
    """Splits sampling parameters into numbers, which are compiled into a program, and arrays.

    Each of the two results has None in place of the parameters of the other; `merge` is the inverse. An array `top_k`
    becomes int32, clipped to it.
    """

    def is_array(value):
        return isinstance(value, jax.Array | np.ndarray)

    def as_array(name: str, value: Any) -> Any:
        if not is_array(value):
            return None
        return _checks.int32(value) if name == "top_k" else jnp.asarray(value)

    numbers = [jax.tree.map(lambda x: None if is_array(x) else x, sampling) for sampling in samplings]
    arrays = [s if s is None else SamplingParams(*map(as_array, SamplingParams._fields, s)) for s in samplings]
    return numbers, arrays


def merge(numbers: list[Any], arrays: list[Any]) -> list[SamplingParams | None]:
    """Inverse of `split`."""
    return [
        None
        if statics is None
        else SamplingParams(
            *(array if number is None else number for number, array in zip(statics, traced, strict=True))
        )
        for statics, traced in zip(numbers, arrays, strict=True)
    ]


def why_not(name: str, logits: Float[Array, "B *rows V"]) -> str | None:
    """The requirement of the kernels that these logits do not meet, or None. Does not check the platform."""
    if mosaic.why_missing() is not None:
        return mosaic.why_missing()
    if not all(isinstance(size, int) for size in logits.shape):
        return f"shapes that are numbers while the program is traced; got {list(logits.shape)}"
    if logits.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{name} of bfloat16, float16 or float32; got {logits.dtype}"
    size = math.prod(logits.shape[:-1]) * max(logits.shape[-1], TILE)  # see `at_least_a_tile`
    if size >= 2**31 - 2**16:
        return f"{name} of fewer than 2**31 - 2**16 elements; got {size}"
    if logits.shape[0] > MAX_BATCH:
        return f"at most {MAX_BATCH} sequences; got {logits.shape[0]}"
    return None


def why_not_sample(logits: Float[Array, "B V"]) -> str | None:
    """Like `why_not`, for `sample`."""
    reason = why_not("logits", logits)
    if reason is None:
        from pallas_kernels import slices

        if not slices.supports(logits.shape[-1]):
            return f"a vocabulary that the registers of a cluster hold; got {logits.shape[-1]}"
    return reason


def sample(
    words: UInt32[Array, "*keys 2"], logits: Float[Array, "B V"], sampling: SamplingParams | None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Returns the result of `draw.sample`: one or two launches, which compute uniforms from the words of the keys."""
    from pallas_kernels import sample as kernel
    from pallas_kernels import sample_filtered, sample_unfiltered

    logits, parameters = at_least_a_tile(logits), limits(sampling)
    if sample_filtered.supports(parameters):
        kernel = sample_filtered
    elif sample_unfiltered.supports(parameters) and sizes.samples_in_two_launches(logits.dtype, *logits.shape):
        kernel = sample_unfiltered
    return kernel.sample(logits, parameters, noise(words, Purpose.DRAFT))


def noise(words: UInt32[Array, "*keys 2"], purpose: Purpose) -> random.Noise:
    """Source of a kernel's uniforms, which equal those of `streams.uniforms`."""
    return random.Noise(words, int(purpose), bool(jax.config.jax_threefry_partitionable), int(Purpose.ROUNDS))


def make_filters(*rows: tuple[Array, SamplingParams | None]) -> list[Filter]:
    """Applies `filters.make_filter` to several arrays `[B, R, V]`, and finds all cutoffs in one launch."""
    from pallas_kernels import cutoffs, slices

    filters = [make_filter(logits[..., :1], _only_temperature(sampling)) for logits, sampling in rows]
    wanted = [i for i, (logits, sampling) in enumerate(rows) if logits.shape[1] and needs_cutoff(sampling)]
    if not wanted:
        return filters
    if not slices.supports(rows[0][0].shape[-1]):
        return [make_filter(logits, sampling) for logits, sampling in rows]
    inputs = [cutoffs.Rows(at_least_a_tile(rows[i][0]), limits(rows[i][1])) for i in wanted]
    for i, kept in zip(wanted, cutoffs.cutoffs(*inputs), strict=True):
        filters[i] = filters[i]._replace(cutoff=kept.cutoff)
    return filters


def needs_cutoff(sampling: SamplingParams | None) -> bool:
    """Whether top-k, top-p or min-p can be on for any row."""
    if sampling is None:
        return False
    off = (sampling.top_k, 0), (sampling.top_p, 1.0), (sampling.min_p, 0.0)
    return not all(is_number(value, number) for value, number in off)


def at_least_a_tile(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows W"]:
    """Pads a vocabulary that is smaller than a tile to one tile, with logits of -inf."""
    missing = TILE - logits.shape[-1]
    if missing <= 0:
        return logits
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def _only_temperature(sampling: SamplingParams | None) -> SamplingParams | None:
    """The parameters with all filters but the temperature turned off."""
    return None if sampling is None else SamplingParams(sampling.temperature)


def limits(sampling: SamplingParams | None) -> Limits:
    """Converts sampling parameters to those of a kernel."""
    if sampling is None:
        return Limits()
    return Limits(*sampling)
