"""A lock that processes on one GPU share: several compile at a time, one measures."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


class Lock:
    """A lock on a file; without one it excludes nobody."""

    def __init__(self, path: Path | None):
        self.path = path

    @contextlib.contextmanager
    def _held(self, mode: int) -> Iterator[None]:
        if self.path is None:
            yield
            return
        with self.path.open("a") as file:
            fcntl.flock(file, mode)
            yield

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """Held while programs are compiled: they run kernels of their own to choose among them."""
        return self._held(fcntl.LOCK_SH)

    def exclusive(self) -> contextlib.AbstractContextManager[None]:
        """Held while something is timed."""
        return self._held(fcntl.LOCK_EX)
