"""Slots: the parameters of a module with their tensors in a checkpoint, and how they are filled."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax.models.checkpoints.gguf_tensors import Quantized
from specsamp_jax.models.checkpoints.tensors import Stored
from specsamp_jax.models.layers import Vocabulary

# Tensors that old versions of transformers wrote in addition: the rotary frequencies, which follow from the config, and
# the head if it is the embedding.
_DERIVED = ".rotary_emb.inv_freq"
_TIED = ("lm_head.weight", "proj_out.weight")
_ROWS = 64  # transposed at once, so that whole cache lines are written; 5 times as fast as all rows at once
_ALIGNMENT = 64  # XLA on a CPU uses an array at such an address without a copy


class Slot(NamedTuple):
    """A parameter and its tensors in a checkpoint.

    Attributes:
      param: The parameter.
      tensors: Names and shapes of its tensors, which are concatenated along their first axis.
      transposed: Whether the parameter is the transpose of the concatenation.
    """

    param: nnx.Param
    tensors: dict[str, tuple[int, ...]]
    transposed: bool = False


def vocabulary_layout(vocabulary: Vocabulary, embedding: str, head: str) -> Iterator[Slot]:
    """Yields the parameters of `vocabulary`, with the names of its tensors."""
    num_features, vocab_size = vocabulary.head.shape
    shape = vocab_size, num_features
    if vocabulary.embedding is not None:
        yield Slot(vocabulary.embedding, {embedding: shape})
    yield Slot(vocabulary.head, {embedding if vocabulary.embedding is None else head: shape}, transposed=True)


def check(slots: Sequence[Slot], stored: Mapping[str, Stored | Quantized]) -> None:
    """Checks that a checkpoint holds the tensors of all slots, and no others.

    Also allowed are `rotary_emb.inv_freq`, and `lm_head.weight` or `proj_out.weight` if no slot has it because the
    head is the embedding.

    Raises:
      ValueError: A tensor is missing, unexpected, of another shape, or not floating point.
    """
    shapes = {name: shape for slot in slots for name, shape in slot.tensors.items()}
    check_present(shapes, stored)
    for name in sorted(stored.keys() - shapes.keys()):
        if not name.endswith(_DERIVED) and name not in _TIED:
            raise ValueError(f"{stored[name].path} holds the tensor {name}, which this model does not have.")
    check_shapes(shapes, stored)


def check_present(names: Iterable[str], stored: Mapping[str, Stored | Quantized]) -> None:
    """Raises ValueError if a checkpoint lacks a tensor."""
    folder = next((entry.path.parent for entry in stored.values()), "The checkpoint")
    for name in names:
        if name not in stored:
            raise ValueError(f"{folder} must hold the tensor {name}, which is missing.")


def check_shapes(shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Stored | Quantized]) -> None:
    """Raises ValueError if a stored tensor has another shape, or is not floating point."""
    for name, shape in shapes.items():
        entry = stored[name]
        if entry.shape != shape:
            raise ValueError(f"{name} must have shape {shape} by the config, got {entry.shape} in {entry.path}.")
        if entry.numpy_dtype is None:
            raise ValueError(f"{name} must be floating point, got {entry.dtype} in {entry.path}.")


def fill(
    slots: Sequence[Slot],
    stored: Mapping[str, Stored | Quantized],
    dtype: DTypeLike | None,
    progress_fn: Callable[[int, int], Any] | None = None,
) -> None:
    """Checks all slots, then sets their parameters one after the other.

    Each parameter is copied from the mapped file into a host buffer, tensor by tensor (dequantized in a
    GGUF file), and from there to the device.
    On a CPU the buffer becomes the parameter; elsewhere it is freed. Peak memory is the loaded parameters, one
    parameter more, and the pages of one tensor.

    Args:
      slots: The parameters; their values are not read.
      stored: The result of `read_headers` or `read_tensors`.
      dtype: The dtype of the parameters. None: the dtype in the file, with float32 for float64, and the wider dtype if
        the tensors of a parameter differ.
      progress_fn: Called after each parameter with the numbers of weights loaded and of all.

    Raises:
      ValueError: See `check`.
    """
    check(slots, stored)
    sizes = [sum(map(math.prod, slot.tensors.values())) for slot in slots]
    for slot, done in zip(slots, itertools.accumulate(sizes), strict=True):
        slot.param.set_value(jax.block_until_ready(jax.device_put(_host_buffer(slot, stored, dtype))))
        if progress_fn is not None:
            progress_fn(done, sum(sizes))


def _host_buffer(slot: Slot, stored: Mapping[str, Stored | Quantized], dtype: DTypeLike | None) -> np.ndarray:
    entries = [stored[name] for name in slot.tensors]
    if dtype is None:
        dtype = jnp.result_type(*(entry.kept_dtype for entry in entries))
    shape = (sum(entry.shape[0] for entry in entries), *entries[0].shape[1:])
    buffer = _aligned(shape[::-1] if slot.transposed else shape, np.dtype(dtype))
    rows, begin = buffer.T if slot.transposed else buffer, 0
    for entry in entries:
        with entry.mapped() as values:
            for i in range(0, len(values), _ROWS):
                end = min(i + _ROWS, len(values))
                rows[begin + i : begin + end] = values[i:end]
            del values
        begin += entry.shape[0]
    return buffer


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that XLA uses without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + num_bytes].view(dtype).reshape(shape)
