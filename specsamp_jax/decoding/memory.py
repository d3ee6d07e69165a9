"""Memory of a generation, computed from shapes before anything is allocated."""

import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.core import Tracer

from specsamp_jax import _checks
from specsamp_jax._types import Model
from specsamp_jax.decoding.model_call import num_slots, output_shapes

_TOKEN_BYTES = 16
"""Bytes per token of the text: an int32 id and a float32 log-probability, in the state and in a result."""


def check(prompt: Any, models: Sequence[Model], *, max_new_tokens: int, longest_draft: int) -> None:
    """Raises ValueError if the state of a generation cannot be indexed, or needs more memory than is free.

    The needed memory is that of the text, the caches of the models, and the logits that a step of the longest draft
    verifies; other activations are not counted. The free memory is that of all devices of the platform that holds the
    weights, because caches may be sharded. For a traced prompt only the indices are checked: its program may run on
    another machine.

    Args:
      prompt: Token ids `[B, P]`.
      models: The models that keep a cache, the target first.
      max_new_tokens: Most tokens that a row may gain.
      longest_draft: The longest draft of a step.
    """
    batch_size, width = prompt.shape
    length = width + max_new_tokens + longest_draft
    if isinstance(length, int) and length > _checks.LARGEST:
        sizes = _describe(width, max_new_tokens, longest_draft)
        raise ValueError(f"{sizes} take {length:,} positions per row; positions must be below 2**31.")
    if isinstance(prompt, Tracer):
        return
    target, *drafters = models
    slots = num_slots(target, width + max_new_tokens, longest_draft)
    max_lengths = [(target, slots), *((model, length) for model in drafters)]
    shapes = [output_shapes(model, prompt.shape, longest) for model, longest in max_lengths]
    caches = sum(num_bytes(cache) for _, cache in shapes)
    rows = [longest_draft + 1, *(longest_draft for _ in drafters)]
    row_bytes = [out.shape[-1] * out.dtype.itemsize for out, _ in shapes]
    logits = batch_size * sum(map(operator.mul, rows, row_bytes))
    text = _TOKEN_BYTES * batch_size * length
    platform = _platform(models)
    free = free_bytes(platform)
    if free is None:
        return
    free *= 1 if platform == "cpu" else jax.device_count(platform)
    if text + caches + logits > free:
        sizes = _describe(width, max_new_tokens, longest_draft)
        raise ValueError(
            f"{sizes} take {gigabytes(text)} for the text of {batch_size:,} rows, {gigabytes(caches)} for the caches "
            f"and {gigabytes(logits)} for the logits of a step, and {gigabytes(free)} are free."
        )


def free_bytes(platform: str | None = None) -> int | None:
    """Returns the memory that is free on the first device of a platform (None: the default); None if not known."""
    device = jax.local_devices(backend=platform)[0]
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    if device.platform != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def num_bytes(shapes: Any) -> int:
    """The bytes of arrays, or of shapes and dtypes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def gigabytes(count: int) -> str:
    """Formats a number of bytes for a message."""
    return f"{count / 1e9:,.1f} GB"


def _describe(width: int, max_new_tokens: int, longest_draft: int) -> str:
    return f"max_new_tokens = {max_new_tokens:,} after prompts of {width:,} tokens, with drafts of {longest_draft:,},"


def _platform(models: Sequence[Model]) -> str:
    """The platform that holds the weights; the default one if none is an array on a device."""
    for leaf in jax.tree.leaves([model.params for model in models]):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer):
            return next(iter(leaf.devices())).platform
    return jax.default_backend()
