"""Safetensors files of a checkpoint: reads their headers, and maps their tensors into memory."""

import contextlib
import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from specsamp_jax._files import brief, check_file, read_json

_TENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


class Stored(NamedTuple):
    """A tensor in a file.

    Attributes:
      path: The file.
      dtype: The name of its dtype in the file.
      shape: The shape.
      start: The offset of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The NumPy dtype; None if it is not floating point."""
        return np.dtype(_DTYPES[self.dtype]) if self.dtype in _DTYPES else None

    @property
    def kept_dtype(self) -> np.dtype:
        """The dtype of a parameter loaded from it: float32 for float64, else its own."""
        return np.dtype(np.float32 if self.dtype == "F64" else _DTYPES[self.dtype])

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        """The values, mapped into memory while the context lasts.

        The mapping is released at its end, because its pages count as memory of the process.
        """
        yield self.values(self.start).reshape(self.shape)

    def values(self, start: int) -> np.ndarray:
        """The values of the file from an offset to the end of the tensor, mapped into memory.

        The file is unmapped when the last array that views it is deleted.
        """
        assert self.numpy_dtype is not None
        end = self.start + math.prod(self.shape) * self.numpy_dtype.itemsize
        # A mapping starts at a page boundary.
        begin = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), end - begin, access=mmap.ACCESS_READ, offset=begin)
        return np.frombuffer(mapping, self.numpy_dtype, offset=start - begin)


def read_headers(folder: Path) -> dict[str, Stored]:
    """Returns the tensors in the files of a checkpoint by name, without reading their values.

    A checkpoint is one file, or several files and an index that lists which file holds which tensor.

    Raises:
      ValueError: A file is missing, broken or no regular file, or the index and the files disagree.
    """
    if (folder / _TENSORS).exists() or not (folder / _INDEX).exists():
        return _read_header(folder / _TENSORS)
    index = folder / _INDEX
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(
            f"{index} must hold weight_map, a JSON object of file names by tensor name, got {brief(files)}."
        )
    names = sorted(set(files.values()))
    for file in names:
        # Path("..").name is "..", and Path("").name is "".
        if file in ("", ".", "..") or Path(file).name != file:
            raise ValueError(f"{index} must name files beside it, got {file!r}.")
    stored = {}
    for file in names:
        try:
            check_file(folder / file)
        except FileNotFoundError:
            first = next(name for name, listed in files.items() if listed == file)
            raise ValueError(f"{index} says that {first} is in {file}, but there is no {folder / file}.") from None
        header = _read_header(folder / file)
        for name in header:
            if files.get(name) != file:
                raise ValueError(f"{folder / file} holds {name}, which {index} has in {files.get(name)!r}.")
        stored |= header
    for name, file in files.items():
        if name not in stored:
            raise ValueError(f"{index} says that {name} is in {file}, which does not hold it.")
    return stored


def _read_header(path: Path) -> dict[str, Stored]:
    try:
        check_file(path)
        # Checks that the header is whole, and that the tensors fill the file without gaps.
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
    except FileNotFoundError:
        pickled = sorted(path.parent.glob("pytorch_model*.bin"))
        hint = (
            f" {pickled[0].name} is a pickle; transformers' save_pretrained writes safetensors of it."
            if pickled
            else ""
        )
        raise ValueError(f"A checkpoint must hold {path.name}, but there is no {path}.{hint}") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + num_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name in names
    }
