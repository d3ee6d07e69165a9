"""The `specsamp` command: `specsamp` or `python -m specsamp`. The library is the package `specsamp_jax`.

Python runs `specsamp_jax/__init__.py`, which imports JAX, before any module of that package. The command starts in this
module instead, so that `specsamp --help` imports no JAX and Ctrl-C during the imports ends it without a traceback.
"""

import _thread
import contextlib
import gc
import importlib
import itertools
import mmap
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

COMMANDS = {
    "certify": "Check that a rule, or a target with a drafter, is exact.",
    "demo": "Continue a docstring with the trained pair, time it, test it.",
    "distill": "Train a drafter for your target on your data.",
    "generate": "Continue texts, or answer in a chat.",
    "transcribe": "Transcribe sound files, or all in a folder.",
}
"""The subcommands, each with the first line of its help, which is cut after 62 characters.

`specsamp_jax.cli.NAME` holds the function `NAME_command`.
"""


_TENSORS = re.compile(r"model.*\.safetensors")
_ACCELERATORS = "/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0"
"""Files of which a machine with an NVIDIA GPU or a TPU has one."""
_CHUNK = 32 << 20
"""Bytes touched at once. After each chunk the thread waits for Python's lock; to end it takes up to one chunk."""
_SMALLEST = 100 << 20
"""Bytes below which touching them saves no time."""
_LARGEST = 4 << 30
"""The most bytes that are touched; in the time in which JAX is imported it is less."""
_ALIGNMENT = 64
"""XLA on a CPU uses an array at a multiple of this address without a copy."""


def main() -> None:
    """Runs the command and exits: with 0, with 2 for wrong input, with 1 for other failures, with 130 for Ctrl-C."""
    # Imports and tracing create many objects, and each collection of garbage visits live ones: .2 of 6 s of a start.
    gc.set_threshold(50_000)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs the command and returns its exit status; a known error is written to standard error as one sentence.

    Args:
      arguments: The arguments after the command's name.
    """
    if sys.stdout is None:
        return _fail(1, "standard output is closed, and the text goes there")
    with _quiet_interrupt():
        memory = touch(weight_folders(arguments))
        import click

        cli = _group(click)
    with _interrupts() as interrupted:
        try:
            try:
                cli.main(list(arguments), prog_name="specsamp", standalone_mode=False, obj=memory)
            except click.exceptions.NoArgsIsHelpError as error:
                click.echo(error.format_message())
            sys.stdout.flush()
            return 0
        except (Exception, KeyboardInterrupt) as error:
            # Libraries turn Ctrl-C into errors of their own, such as JAX a comparison in a ValueError.
            return 130 if interrupted.is_set() else _status(error, click)
        finally:
            if memory is not None:
                with _quiet_interrupt():
                    memory.release()


class TouchedMemory:
    """Memory that a thread touches, from which buffers are taken.

    The first touch of memory takes longer than a copy into it, and Python's lock is free meanwhile. Linux only.

    Args:
      num_bytes: Size of the mapping in bytes.
    """

    def __init__(self, num_bytes: int):
        import ctypes

        self._memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if sys.platform == "linux":
            with contextlib.suppress(OSError):  # the kernel has none
                # As NumPy does for large arrays: a transpose writes to many pages at once.
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._memset = ctypes.memset
        self._num_touched = self._num_taken = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._touch)
        self._thread.start()

    def _touch(self) -> None:
        # Not by MADV_POPULATE_WRITE: it locks the address space, and each import of a library waits for it.
        size = len(self._memory)
        # Python waits for this thread when it exits: the main thread has ended by then.
        while self._num_touched < size and not self._stop.is_set() and threading.main_thread().is_alive():
            chunk = min(_CHUNK, size - self._num_touched)
            self._memset(self._address + self._num_touched, 0, chunk)
            self._num_touched += chunk

    def take(self, num_bytes: int) -> memoryview | None:
        """Returns touched memory at a multiple of 64 bytes; None if less is left. The thread ends first."""
        self._end()
        begin = self._num_taken
        if num_bytes > self._num_touched - begin:
            return None
        self._num_taken += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return memoryview(self._memory)[begin : begin + num_bytes]

    def release(self) -> None:
        """Returns the memory that was not taken to the system; afterwards none can be taken."""
        self._end()
        begin = -(-self._num_taken // mmap.PAGESIZE) * mmap.PAGESIZE
        if sys.platform == "linux" and begin < self._num_touched:
            self._memory.madvise(mmap.MADV_DONTNEED, begin)
        self._num_touched = self._num_taken

    def _end(self) -> None:
        self._stop.set()
        self._thread.join()


def touch(folders: Sequence[str]) -> TouchedMemory | None:
    """Begins to touch memory for half of the weights in these folders, as much as `begin_all` copies ahead.

    Returns None, and never raises, for small weights, for weights larger than the memory that is available, for GGUF
    files, ids and folders that do not exist, on systems other than Linux, and beside a GPU or TPU, whose memory the
    weights go to.
    """
    if sys.platform != "linux" or any(map(os.path.exists, _ACCELERATORS)):
        return None
    try:
        total = sum(_weight_bytes(folder) for folder in folders)
        if total // 2 >= _SMALLEST and total <= _available_bytes():
            return TouchedMemory(min(total // 2, _LARGEST))
    # No such folder, an impossible name, no memory, no new thread, a Python without ctypes.
    except (OSError, ValueError, MemoryError, RuntimeError, ImportError):
        pass
    return None


def weight_folders(arguments: Sequence[str]) -> list[str]:
    """Returns the folders whose weights the command with these arguments loads, as far as its options show them."""
    if arguments[:1] != ["generate"] or not {"-h", "--help"}.isdisjoint(arguments):
        return []
    values = {}
    for argument, following in itertools.pairwise([*arguments, ""]):
        option, equals, value = argument.partition("=")
        if option in ("--target", "--draft"):
            values[option] = value if equals else following
    return list(values.values()) if "--target" in values else []


def _weight_bytes(folder: str) -> int:
    """The bytes of the safetensors files in a folder; 0 for a file or name that is no folder."""
    if not os.path.isdir(folder):
        return 0
    with os.scandir(folder) as entries:
        return sum(entry.stat().st_size for entry in entries if _TENSORS.fullmatch(entry.name))


def _available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), 0)


def _status(error: Any, click: Any) -> int:
    """The exit status of an error, which is written as one sentence if it is known, and raised otherwise."""
    if isinstance(error, click.ClickException):
        return _fail(error.exit_code, error.format_message())
    if isinstance(error, (click.Abort, KeyboardInterrupt)):
        return 130
    if isinstance(error, BrokenPipeError):  # the reader, such as `head`, has what it wanted
        _discard_output()
        return 1
    if isinstance(error, OSError):
        if error.filename is None:
            _discard_output()
        return _fail(1, f"{error.filename or 'standard output'}: {error.strerror or error}")
    if isinstance(error, ValueError):
        return _fail(2, str(error))
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)):
        return _fail(1, f"out of memory: {str(error).splitlines()[0] if str(error) else 'no reason was given'}")
    raise error


def _group(click):
    """The command and its subcommands, each imported when it is called."""

    class LazyGroup(click.Group):
        def resolve_command(self, ctx, args):
            if args[0] in COMMANDS:
                with _quiet_interrupt():
                    module = importlib.import_module(f"specsamp_jax.cli.{args[0]}")
                self.add_command(vars(module)[f"{args[0]}_command"])
            return super().resolve_command(ctx, args)

    group = LazyGroup(
        "specsamp",
        help="Exact speculative sampling in JAX.",
        context_settings={"help_option_names": ["-h", "--help"]},
        commands={name: click.Command(name, help=line) for name, line in COMMANDS.items()},
    )
    return click.version_option(package_name="specsamp")(group)


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """While it lasts, Ctrl-C also sets the event, and is raised again where Python or a library drops it."""
    interrupted = threading.Event()

    def on_interrupt(number, frame):
        interrupted.set()
        signal.default_int_handler(number, frame)

    dropped_hook, sys.unraisablehook = sys.unraisablehook, _raise_interrupt_again
    try:
        with _interrupt_handler(on_interrupt):
            yield interrupted
    finally:
        sys.unraisablehook = dropped_hook


def _quiet_interrupt() -> contextlib.AbstractContextManager[None]:
    """While it lasts, Ctrl-C ends the process by the signal itself, with nothing written."""
    return _interrupt_handler(signal.SIG_DFL)


@contextlib.contextmanager
def _interrupt_handler(new) -> Iterator[None]:
    """While it lasts, `new` handles Ctrl-C, unless it is ignored, as under nohup, or handled by somebody else."""
    handler = signal.getsignal(signal.SIGINT)
    ours = handler is signal.default_int_handler or getattr(handler, "__module__", None) == __name__
    if not ours or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, new)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _raise_interrupt_again(unraisable) -> None:
    """Repeats a Ctrl-C that came where Python drops exceptions: JAX has such a function, called at garbage collections.

    While XLA compiles, a signal waits for the next line of Python, which often is in that function.
    """
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    # Later, and by a thread: at once it would be raised in this function, and dropped.
    timer = threading.Timer(0.01, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _discard_output() -> None:
    """Sends what is left in the buffer of standard output nowhere, or Python would fail on it at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(status: int, sentence: str) -> int:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"specsamp: {sentence}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    main()
