"""Where the parameters of a module stand in a checkpoint, and how they are filled from it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax.models.checkpoints.tensors import Stored
from specsamp_jax.models.layers import Vocabulary

# Tensors that old versions of transformers wrote beside the parameters: the rotary frequencies, which follow from the
# config, and the head where it is the embedding.
_DERIVED = ".rotary_emb.inv_freq"
_TIED = ("lm_head.weight", "proj_out.weight")
_ROWS = 64  # transposed at a time: with 2 bytes each, whole cache lines are written; 5 times as fast as all at once
_ALIGNMENT = 64  # XLA's on a CPU: arrays at such addresses are taken as they are, not copied


class Slot(NamedTuple):
    """Where one parameter stands in a checkpoint.

    Attributes:
      param: The parameter.
      tensors: Names and shapes of the tensors that make it up, in order of their first axis.
      transposed: Whether the parameter is the transpose of the tensors.
    """

    param: nnx.Param
    tensors: dict[str, tuple[int, ...]]
    transposed: bool = False


def vocabulary_layout(vocabulary: Vocabulary, embedding: str, head: str) -> Iterator[Slot]:
    """Yields the parameters of `vocabulary` with the tensors of these names."""
    num_features, vocab_size = vocabulary.head.shape
    shape = vocab_size, num_features
    if vocabulary.embedding is not None:
        yield Slot(vocabulary.embedding, {embedding: shape})
    yield Slot(vocabulary.head, {embedding if vocabulary.embedding is None else head: shape}, transposed=True)


def check(slots: Sequence[Slot], stored: Mapping[str, Stored]) -> None:
    """Checks that a checkpoint holds the tensors of all slots, and no others.

    Allowed besides are `rotary_emb.inv_freq`, and `lm_head.weight` or `proj_out.weight` where no slot has it,
    because the head is the embedding.

    Raises:
      ValueError: A tensor is missing, superfluous, of another shape, or no floating point.
    """
    shapes = {name: shape for slot in slots for name, shape in slot.tensors.items()}
    folder = next((entry.path.parent for entry in stored.values()), "The checkpoint")
    for name in shapes:
        if name not in stored:
            raise ValueError(f"{folder} must hold the tensor {name}, which is missing.")
    for name in sorted(stored.keys() - shapes.keys()):
        if not name.endswith(_DERIVED) and name not in _TIED:
            raise ValueError(f"{stored[name].path} holds the tensor {name}, which this model does not have.")
    for name, shape in shapes.items():
        entry = stored[name]
        if entry.shape != shape:
            raise ValueError(f"{name} must have shape {shape} by the config, got {entry.shape} in {entry.path}.")
        if entry.numpy_dtype is None:
            raise ValueError(f"{name} must be floating point, got {entry.dtype} in {entry.path}.")


def fill(slots: Sequence[Slot], stored: Mapping[str, Stored], dtype: DTypeLike | None) -> None:
    """Sets the parameters of all slots, one after the other, once all of them are checked.

    Each goes from the mapped file into one host buffer of its own, tensor by tensor, and from there to the
    device. On a CPU the buffer becomes the parameter; elsewhere it is freed. So the most that is in memory at
    once is what is loaded, one parameter, and the pages of one tensor.

    Args:
      slots: The parameters; their values are not read.
      stored: Of `read_headers`.
      dtype: What the parameters are kept in; None: what the file has, float64 being float32, and the wider type
        where tensors that make up one parameter differ.

    Raises:
      ValueError: See `check`.
    """
    check(slots, stored)
    for slot in slots:
        slot.param.set_value(jax.block_until_ready(jax.device_put(_host_buffer(slot, stored, dtype))))


def _host_buffer(slot: Slot, stored: Mapping[str, Stored], dtype: DTypeLike | None) -> np.ndarray:
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
    """An array of anything, at an address that XLA takes as it is."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + num_bytes].view(dtype).reshape(shape)
