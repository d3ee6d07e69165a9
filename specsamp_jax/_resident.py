"""Returns memory to the system that a process keeps after a compilation: freed heap, code and constants."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_SMAPS = Path("/proc/self/smaps")
_LARGE = 8 << 20
"""Resident bytes from which a mapping is worth a system call: of JAX's library, not of Python's."""
_DONTNEED = 4  # MADV_DONTNEED of Linux


class Mapping(NamedTuple):
    """A part of the address space.

    Attributes:
      begin: Its first address.
      end: The address after its last.
      mode: Its permissions: `r-xp` for the code of a library.
      inode: The file that is mapped; 0 if there is none.
      resident: Bytes in memory.
      changed: Bytes that differ from the file, also those that were swapped out.
    """

    begin: int
    end: int
    mode: str
    inode: int
    resident: int
    changed: int


def release() -> None:
    """Returns freed heap memory and the unchanged code and constants of large libraries to the system.

    XLA's compiler frees more memory than it keeps, and leaves a hundred megabytes of its library resident. Pages that
    are used again are mapped again from the page cache, one by one. Does nothing on systems other than Linux.
    """
    if sys.platform != "linux":
        return
    trim()
    libc = ctypes.CDLL(None)
    with contextlib.suppress(OSError):  # /proc may be hidden
        for mapping in unchanged(_SMAPS.read_text().splitlines()):
            # Nothing is lost: these pages are read-only and equal to the file's.
            size = ctypes.c_size_t(mapping.end - mapping.begin)
            libc.madvise(ctypes.c_void_p(mapping.begin), size, ctypes.c_int(_DONTNEED))


def trim() -> None:
    """Returns freed heap memory to the system, that of all threads. Does nothing without glibc."""
    if sys.platform == "linux":
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)


def unchanged(smaps: Iterable[str]) -> list[Mapping]:
    """Returns the read-only mappings of large libraries in lines of /proc/PID/smaps, those without changed pages."""
    return [
        mapping
        for mapping in _mappings(smaps)
        if mapping.mode in ("r-xp", "r--p") and mapping.inode and not mapping.changed and mapping.resident >= _LARGE
    ]


def _mappings(smaps: Iterable[str]) -> Iterator[Mapping]:
    mapping = None
    for line in smaps:
        header = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ (\d+)", line)
        if header:
            if mapping is not None:
                yield mapping
            begin, end = int(header[1], 16), int(header[2], 16)
            mapping = Mapping(begin, end, header[3], int(header[4]), 0, 0)
        elif mapping is not None:
            name, _, value = line.partition(":")
            if name == "Rss":
                mapping = mapping._replace(resident=1024 * int(value.split()[0]))
            elif name in ("Private_Dirty", "Shared_Dirty", "Anonymous", "Swap"):
                mapping = mapping._replace(changed=mapping.changed + 1024 * int(value.split()[0]))
    if mapping is not None:
        yield mapping
