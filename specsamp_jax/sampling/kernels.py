"""The GPU kernels that sample and filter: the same tokens as the plain JAX cores, the same tokens kept."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import mosaic, random
from pallas_kernels.limits import Limits
from specsamp_jax._types import TILE, Filter, SamplingParams
from specsamp_jax.sampling.filters import is_number, make_filter
from specsamp_jax.sampling.streams import Purpose

if TYPE_CHECKING or mosaic.WHY_MISSING is None:
    from pallas_kernels import cutoffs, slices
    from pallas_kernels import sample as sample_kernel

MAX_BATCH = 65_535
"""Limit of the last axis of a CUDA grid."""


def split(*samplings: SamplingParams | None) -> tuple[list[Any], list[Any]]:
    """Sampling parameters as numbers, compiled into a program, and arrays; None stands for each in the other."""

    def is_array(value):
        return isinstance(value, jax.Array | np.ndarray)

    numbers = [jax.tree.map(lambda x: None if is_array(x) else x, one) for one in samplings]
    arrays = [jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else None, one) for one in samplings]
    return numbers, arrays


def merge(numbers: list[Any], arrays: list[Any]) -> list[SamplingParams | None]:
    """The parameters that `split` took apart."""
    return [
        None if one is None else SamplingParams(*(a if x is None else x for x, a in zip(one, other, strict=True)))
        for one, other in zip(numbers, arrays, strict=True)
    ]


def why_not(name: str, logits: Float[Array, "B *rows V"]) -> str | None:
    """The requirement of the kernels that these logits do not meet; None where they meet all."""
    if mosaic.WHY_MISSING is not None:
        return mosaic.WHY_MISSING
    if not all(isinstance(size, int) for size in logits.shape):
        return f"shapes that are numbers while the program is traced; got {list(logits.shape)}"
    if logits.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"{name} of bfloat16, float16 or float32; got {logits.dtype}"
    if logits.size >= 2**31 - 2**16:
        return f"{name} of fewer than 2**31 - 2**16 elements; got {logits.size}"
    if logits.shape[0] > MAX_BATCH:
        return f"at most {MAX_BATCH} sequences; got {logits.shape[0]}"
    return None


def why_not_sample(logits: Float[Array, "B V"]) -> str | None:
    """Like `why_not`, for `sample`."""
    reason = why_not("logits", logits)
    if reason is None and not slices.supports(logits.shape[-1]):
        return f"a vocabulary that the registers of a cluster hold; got {logits.shape[-1]}"
    return reason


def sample(
    words: UInt32[Array, "*keys 2"], logits: Float[Array, "B V"], sampling: SamplingParams | None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """`draw.sample` in one launch, from the words of its key."""
    return sample_kernel.sample(
        at_least_a_tile(logits),
        limits(sampling),
        noise(words, Purpose.DRAFT),
    )


def noise(words: UInt32[Array, "*keys 2"], purpose: Purpose) -> random.Noise:
    """The source of a kernel's uniforms: those of `streams.uniforms`."""
    return random.Noise(words, int(purpose), bool(jax.config.jax_threefry_partitionable))


def make_filters(*rows: tuple[Array, SamplingParams | None]) -> list[Filter]:
    """`filters.make_filter` of several arrays `[B, R, V]`, with all cutoffs from one launch."""
    filters = [make_filter(logits[..., :1], _only_temperature(sampling)) for logits, sampling in rows]
    wanted = [i for i, (logits, sampling) in enumerate(rows) if logits.shape[1] and needs_cutoff(sampling)]
    if not wanted:
        return filters
    if not slices.supports(rows[0][0].shape[-1]):
        return [make_filter(*one) for one in rows]
    inputs = [cutoffs.Rows(at_least_a_tile(rows[i][0]), limits(rows[i][1])) for i in wanted]
    for i, kept in zip(wanted, cutoffs.cutoffs(*inputs), strict=True):
        filters[i] = filters[i]._replace(cutoff=kept.cutoff)
    return filters


def needs_cutoff(sampling: SamplingParams | None) -> bool:
    """Whether top-k, top-p or min-p may be on for any row."""
    if sampling is None:
        return False
    off = (sampling.top_k, 0), (sampling.top_p, 1.0), (sampling.min_p, 0.0)
    return not all(is_number(value, number) for value, number in off)


def at_least_a_tile(logits: Float[Array, "*rows V"]) -> Float[Array, "*rows W"]:
    """The logits themselves, or, of a vocabulary smaller than a tile, with -inf up to one."""
    missing = TILE - logits.shape[-1]
    if missing <= 0:
        return logits
    return jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, missing)], constant_values=-jnp.inf)


def _only_temperature(sampling: SamplingParams | None) -> SamplingParams | None:
    return None if sampling is None else SamplingParams(sampling.temperature)


def limits(sampling: SamplingParams | None) -> Limits:
    """The parameters as a kernel takes them: numbers that it is compiled for, or arrays."""
    if sampling is None:
        return Limits()
    return Limits(*sampling)
