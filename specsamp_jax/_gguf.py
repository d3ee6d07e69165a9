"""GGUF files: their metadata and the places of their tensors, with each count compared with the size of the file.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specsamp_jax._files import Kind, brief, check_file, read_setting

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER = 1 << 27
"""The longest header that is read, 128 MiB; that of a vocabulary of 262,144 tokens has 6 MB."""

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_MAX_DIMENSIONS = 4
_LEAST_SETTING, _LEAST_TENSOR = 13, 24  # bytes of the shortest entries of the header


class Tensor(NamedTuple):
    """A tensor in a GGUF file.

    Attributes:
      shape: Its shape, the slowest axis first, unlike in the file.
      kind: The number of its quantization type.
      start: The offset of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


class Header(NamedTuple):
    """The header of a GGUF file.

    Attributes:
      path: The file.
      size: Its bytes.
      metadata: Values by key: numbers, texts, lists of texts, and arrays of numbers.
      tensors: Tensors by name. They may lie outside the file: their sizes depend on their types.
    """

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def setting(self, name: str, kind: Kind, default: Any = None) -> Any:
        """Returns a value of the metadata with its type checked, or `default` if it is missing."""
        return read_setting(self.metadata, name, kind, source=self.path, default=default)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file: by its suffix, or by the first bytes of a regular file."""
    if path.is_dir():
        return False
    if path.suffix.lower() == ".gguf":
        return os.path.lexists(path)
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except (OSError, ValueError):  # ValueError: the name holds a null byte
        return False


def read_gguf(path: Path) -> Header:
    """Returns the header of a GGUF file; the last two are kept until their files change.

    Raises:
      ValueError: It is no regular file, no GGUF file of a supported version, one part of several, or cut off within its
        header; or the header has more entries or is longer than it can be.
    """
    try:
        size = check_file(path)
    except FileNotFoundError:
        raise ValueError(f"There is no {path}.") from None
    return _read(path, size, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _read(path: Path, size: int, changed: int) -> Header:
    try:
        with path.open("rb") as file:
            if (magic := file.read(len(_MAGIC))) != _MAGIC:
                raise ValueError(f"{path} must be a GGUF file, but it begins with {magic!r}.")
            content = mmap.mmap(file.fileno(), min(size, _MAX_HEADER), access=mmap.ACCESS_READ)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    with content:
        return _parse(_Cursor(content, path, size))


def _parse(cursor: "_Cursor") -> Header:
    path = cursor.path
    version = cursor.number("<u4", "its version")
    if version not in _VERSIONS:
        order = " with the bytes of each number reversed" if version & 0xFFFF == 0 else ""
        raise ValueError(f"{path} must be a GGUF file of version 2 or 3, got {version}{order}.")
    num_tensors = cursor.count(_LEAST_TENSOR, "tensors")
    num_settings = cursor.count(_LEAST_SETTING, "settings")
    metadata: dict[str, Any] = {}
    for _ in range(num_settings):
        key = cursor.text("the name of a setting")
        if key in metadata:
            raise ValueError(f"{path} must hold {brief(key)} once, and holds it twice.")
        metadata[key] = cursor.value(cursor.number("<u4", key), key)
    num_parts = metadata.get("split.count", 0)
    if num_parts not in (0, 1):
        raise ValueError(
            f"{path} is one of {brief(num_parts)} parts of a model; `llama-gguf-split --merge` joins them."
        )
    tensors: dict[str, Tensor] = {}
    for _ in range(num_tensors):
        name = cursor.text("the name of a tensor")
        num_dimensions = cursor.number("<u4", name)
        if name in tensors or not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            why = "twice" if name in tensors else f"with {num_dimensions} dimensions"
            raise ValueError(
                f"{path} must hold each tensor once, with 1 to 4 dimensions, and holds {brief(name)} {why}."
            )
        shape = [cursor.number("<u8", name) for _ in range(num_dimensions)]
        tensors[name] = Tensor(tuple(reversed(shape)), cursor.number("<u4", name), cursor.number("<u8", name))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20:
        raise ValueError(f"general.alignment in {path} must be from 1 to {1 << 20}, got {brief(alignment)}.")
    start = math.ceil(cursor.position / alignment) * alignment
    tensors = {name: tensor._replace(start=start + tensor.start) for name, tensor in tensors.items()}
    return Header(path, cursor.size, metadata, tensors)


class _Cursor:
    """Position in the header of a file, of which `content` is the beginning."""

    def __init__(self, content: mmap.mmap, path: Path, size: int):
        self.content, self.path, self.size = content, path, size
        self.position = len(_MAGIC)

    def skip(self, num_bytes: int, what: str) -> int:
        """Returns the position before the next bytes, and moves behind them, if they are there."""
        begin, end = self.position, self.position + num_bytes
        if end > len(self.content):
            limit = f"the file has {self.size:,}" if end > self.size else f"a header may have {_MAX_HEADER:,}"
            raise ValueError(f"{self.path} is cut off or damaged: {brief(what)} ends at byte {end:,}, and {limit}.")
        self.position = end
        return begin

    def number(self, dtype: str, what: str) -> Any:
        """Returns a number, or a boolean."""
        begin = self.skip(np.dtype(dtype).itemsize, what)
        return np.frombuffer(self.content, dtype, 1, begin)[0].item()

    def count(self, least: int, what: str) -> int:
        """Returns the number of entries that follow, each of `least` bytes or more."""
        count = self.number("<u8", what)
        if count * least > len(self.content) - self.position:
            raise ValueError(f"{self.path} is cut off or damaged: it states {count:,} {what}, more than fit in it.")
        return count

    def text(self, what: str) -> str:
        """Returns a text."""
        length = self.number("<u8", what)
        begin = self.skip(length, what)
        return self.decode(begin, begin + length, what)

    def decode(self, begin: int, end: int, what: str) -> str:
        """Returns bytes as text."""
        try:
            return self.content[begin:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{brief(what)} in {self.path} must be text in UTF-8: {error.reason}.") from error

    def value(self, kind: int, key: str) -> Any:
        """Returns the value of a setting."""
        if kind == _STRING:
            return self.text(key)
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], key)
        kind_of_each = self.number("<u4", key) if kind == _ARRAY else None
        if kind_of_each == _STRING:
            return self.texts(self.count(8, f"texts of {key}"), key)
        if kind_of_each in _SCALARS:
            dtype = np.dtype(_SCALARS[kind_of_each])
            count = self.count(dtype.itemsize, f"numbers of {key}")
            return np.frombuffer(self.content, dtype, count, self.skip(count * dtype.itemsize, key)).copy()
        raise ValueError(
            f"{brief(key)} in {self.path} must be a number, a text or an array of one of them; got the type "
            f"{kind if kind_of_each is None else f'{kind} of {kind_of_each}'}."
        )

    def texts(self, count: int, what: str) -> list[str]:
        """Returns texts, in a loop that is short because a vocabulary has many."""
        content, limit, length_at = self.content, len(self.content), struct.Struct("<Q").unpack_from
        texts, position = [], self.position
        for _ in range(count):
            begin = position + 8
            position = begin + length_at(content, position)[0] if begin <= limit else begin
            if position > limit:
                self.skip(position - self.position, what)
            texts.append(self.decode(begin, position, what))
        self.position = position
        return texts
