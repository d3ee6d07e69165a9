"""The safetensors files of a checkpoint: their headers, then their bytes by memory map."""

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

from specsamp_jax._files import read_json

_TENSORS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES: dict[str, Any] = {"BF16": jnp.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}


class Stored(NamedTuple):
    """One tensor in a file.

    Attributes:
      path: The file.
      dtype: The type's name in the file.
      shape: The shape.
      start: Where its bytes begin in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numpy_dtype(self) -> np.dtype | None:
        """The type; None where it is no floating point."""
        return np.dtype(_DTYPES[self.dtype]) if self.dtype in _DTYPES else None

    @property
    def kept_dtype(self) -> np.dtype:
        """The type that a parameter of it has; what is float64 in a file is float32."""
        return np.dtype(np.float32 if self.dtype == "F64" else _DTYPES[self.dtype])

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        """The values, mapped while the context lasts.

        Then the pages leave memory: those of a mapping count as the process's own as long as it is there.
        """
        assert self.numpy_dtype is not None
        num = math.prod(self.shape)
        # A mapping begins at a page.
        begin = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        num_bytes = self.start - begin + num * self.numpy_dtype.itemsize
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ, offset=begin)
        values = np.frombuffer(mapping, self.numpy_dtype, num, self.start - begin).reshape(self.shape)
        yield values
        # It is unmapped with the last array that looks into it.
        del values, mapping


def read_headers(folder: Path) -> dict[str, Stored]:
    """Returns what the files of a checkpoint hold, by tensor name; no tensor is read.

    One file, or several and an index that says which tensor is in which.

    Raises:
      ValueError: A file is missing or broken, or the index and the files do not say the same.
    """
    if (folder / _TENSORS).exists() or not (folder / _INDEX).exists():
        return _read_header(folder / _TENSORS)
    index = folder / _INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} must hold weight_map, a JSON object of file names by tensor name, got {places!r}.")
    stored = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file:
            raise ValueError(f"{index} must name files beside it, got {file!r}.")
        if not (folder / file).exists():
            first = next(name for name, place in places.items() if place == file)
            raise ValueError(f"{index} says that {first} is in {file}, but there is no {folder / file}.")
        header = _read_header(folder / file)
        for name in header:
            if places.get(name) != file:
                raise ValueError(f"{folder / file} holds {name}, which {index} has in {places.get(name)!r}.")
        stored |= header
    for name, file in places.items():
        if name not in stored:
            raise ValueError(f"{index} says that {name} is in {file}, which does not hold it.")
    return stored


def _read_header(path: Path) -> dict[str, Stored]:
    try:
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
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(num_bytes))
    return {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + num_bytes + entry["data_offsets"][0])
        for name, entry in header.items()
        if name in names
    }
