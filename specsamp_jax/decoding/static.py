"""Sampling parameters in two parts: what decides which program is compiled, and what may change without a new trace."""

from typing import Any

from jax.typing import ArrayLike

from specsamp_jax._types import SamplingParams
from specsamp_jax.sampling.filters import is_number

_CERTAIN = {"temperature": (0.0, 1.0), "top_k": (0,), "top_p": (1.0,), "min_p": (0.0,)}  # off, or greedy

Fixed = tuple[tuple[str, Any], ...]


def split(sampling: SamplingParams) -> tuple[Fixed, dict[str, ArrayLike]]:
    """The parameters that are certainly off or certainly greedy, with their names, and the others.

    The first is hashable: it decides what is compiled, so that a filter that is off costs nothing and one
    that is on can change without a new trace.
    """
    fixed, traced = {}, {}
    for name, value in sampling._asdict().items():
        certain = any(is_number(value, number) for number in _CERTAIN[name])
        (fixed if certain else traced)[name] = value
    return tuple(fixed.items()), traced


def join(fixed: Fixed, traced: dict[str, ArrayLike]) -> SamplingParams:
    """The parameters that `split` split."""
    return SamplingParams(**dict(fixed), **traced)
