"""Embeddings that stay in their file: a CPU reads the rows of a text from the mapped file, and not the others."""

import math
from collections.abc import Mapping

from jax.typing import DTypeLike

from specsamp_jax.models.checkpoints.gguf_tensors import Quantized
from specsamp_jax.models.checkpoints.slots import ALIGNMENT, Slot, loaded_dtype
from specsamp_jax.models.checkpoints.tensors import Stored

_MOST = 2**31 - 64  # values: XLA finds a row by a 32-bit index


def leave_in_file(slot: Slot, stored: Mapping[str, Stored | Quantized], dtype: DTypeLike | None) -> Slot:
    """Returns the slot of an embedding with its values in the file, or as it is if they must be converted.

    XLA needs addresses at multiples of 64 bytes, but a tensor begins anywhere in its file. So the values begin up to 63
    bytes before the tensor, and have one dimension: `Vocabulary.embed` finds the rows at their end. The file must not
    be shortened while they are in use: the system ends a process that reads past its end.
    """
    (name,) = slot.tensors
    entry = stored.get(name)
    # For a tensor that is missing, of another shape or not floating point `check` raises, before a model is made.
    if not isinstance(entry, Stored) or entry.numpy_dtype is None or not 0 < math.prod(entry.shape) < _MOST:
        return slot
    loaded = loaded_dtype(slot, stored, dtype)
    if entry.numpy_dtype != loaded or entry.start % loaded.itemsize:
        return slot
    return slot._replace(in_file=entry.values(entry.start // ALIGNMENT * ALIGNMENT))
