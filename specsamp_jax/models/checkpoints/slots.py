"""Slots: the parameters of a module with their tensors in a checkpoint, and how they are filled."""

import collections
import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
# A transpose is copied in blocks of this shape through a scratch array in the second-level cache. Its rows are padded:
# rows of the file lie multiples of large powers of 2 apart, so that 128 of them share a few sets of the first-level
# cache. Twice as fast as without the scratch array; 64 rows are half as fast.
_ROWS, _COLUMNS, _PADDING = 128, 1024, 32
_PIECE = 1 << 21  # weights that a thread copies at once
# First touches of memory take longer than the copy: a virtual machine gets half a gigabyte a second per thread.
_MOST_THREADS = 4
_AHEAD = 2  # parameters begun before the first of them is complete
_MOST_AHEAD = 0.5  # share of the weights

ALIGNMENT = 64
"""XLA on a CPU uses an array at a multiple of these bytes without a copy."""


class Slot(NamedTuple):
    """A parameter and its tensors in a checkpoint.

    Attributes:
      param: The parameter.
      tensors: Names and shapes of its tensors, which are concatenated along their first axis.
      transposed: Whether the parameter is the transpose of the concatenation.
      read_by_row: Whether the module looks up rows of the parameter, and uses it for nothing else.
      in_file: The values that become the parameter without a copy, from `in_file.leave_in_file`; None: it is copied.
    """

    param: nnx.Param
    tensors: dict[str, tuple[int, ...]]
    transposed: bool = False
    read_by_row: bool = False
    in_file: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the parameter after loading."""
        return self.param.shape if self.in_file is None else self.in_file.shape


def vocabulary_layout(vocabulary: Vocabulary, embedding: str, head: str) -> Iterator[Slot]:
    """Yields the parameters of `vocabulary`, with the names of its tensors."""
    num_features, vocab_size = vocabulary.head.shape
    shape = vocab_size, num_features
    if vocabulary.embedding is not None:
        yield Slot(vocabulary.embedding, {embedding: shape}, read_by_row=True)
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


def loaded_dtype(slot: Slot, stored: Mapping[str, Stored | Quantized], dtype: DTypeLike | None) -> np.dtype:
    """Returns the dtype that `fill` gives a parameter."""
    if dtype is None:
        dtype = jnp.result_type(*(stored[name].kept_dtype for name in slot.tensors))
    return np.dtype(dtype)


def most_common_dtype(stored: Mapping[str, Stored | Quantized]) -> np.dtype:
    """Returns the dtype of most of the weights; float64 counts as float32."""
    counts = collections.Counter()
    for entry in stored.values():
        if entry.numpy_dtype is not None:
            counts[entry.kept_dtype] += math.prod(entry.shape)
    return counts.most_common(1)[0][0] if counts else np.dtype(np.float32)


class Ahead(NamedTuple):
    """Parameters that a thread copies while others work.

    Attributes:
      buffers: Host buffers by the index of their slot.
      pieces: The pieces that are not copied yet, with the index of their slot.
      stop: Ends the thread after its piece.
      thread: The thread, which may not have been started.
    """

    buffers: dict[int, np.ndarray]
    pieces: collections.deque[tuple[int, "Piece"]]
    stop: threading.Event
    thread: threading.Thread


class Piece(NamedTuple):
    """Rows of a tensor, and the part of a parameter, possibly a transpose, to which they are copied."""

    entry: Stored | Quantized
    rows: slice
    out: np.ndarray


def copy_ahead(
    slots: Sequence[Slot],
    stored: Mapping[str, Stored | Quantized],
    dtype: DTypeLike | None,
    take_fn: Callable[[int], memoryview | None] = lambda num_bytes: None,
) -> Ahead:
    """Begins to copy parameters of up to half of the weights, the largest first, in a thread.

    The compiler, which may work meanwhile, can use the memory of the other half without a higher peak.

    Args:
      slots: The parameters.
      stored: The tensors.
      dtype: As in `fill`.
      take_fn: Returns writable memory of a number of bytes at a multiple of 64 bytes; None: a parameter gets its own.

    Raises:
      ValueError: See `check`.
    """
    check(slots, stored)
    dtypes = [loaded_dtype(slot, stored, dtype) for slot in slots]
    sizes = [math.prod(slot.shape) * dtypes[i].itemsize for i, slot in enumerate(slots)]
    left, buffers, pieces = _MOST_AHEAD * sum(sizes), {}, collections.deque()
    for i in sorted(range(len(slots)), key=sizes.__getitem__, reverse=True):
        if slots[i].in_file is None and _PIECE <= sizes[i] <= left:
            left -= sizes[i]
            taken = take_fn(sizes[i])
            if taken is None:
                buffers[i] = _aligned(slots[i].param.shape, dtypes[i])
            else:
                buffers[i] = np.frombuffer(taken, dtypes[i]).reshape(slots[i].param.shape)
            pieces += [(i, piece) for piece in _pieces(slots[i], stored, buffers[i])]
    stop = threading.Event()
    ahead = Ahead(buffers, pieces, stop, threading.Thread(target=_copy_pieces, args=(pieces, stop)))
    with contextlib.suppress(RuntimeError):  # no thread can be started: `fill` copies all
        ahead.thread.start()
    return ahead


def _copy_pieces(pieces: collections.deque[tuple[int, Piece]], stop: threading.Event) -> None:
    # Python waits for this thread when it exits: the main thread has ended by then.
    while pieces and not stop.is_set() and threading.main_thread().is_alive():
        try:
            _copy(*pieces[0][1])
        except Exception:
            return  # `fill` repeats it, and raises the error
        pieces.popleft()


def fill(
    slots: Sequence[Slot],
    stored: Mapping[str, Stored | Quantized],
    dtype: DTypeLike | None,
    progress_fn: Callable[[int, int], Any] | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Checks all slots, then sets their parameters one after the other.

    Each parameter is copied from the mapped file into a host buffer by up to four threads, piece by piece (dequantized
    in a GGUF file), and from there to the device. On a CPU the buffer becomes the parameter; elsewhere it is freed.
    Peak memory is the loaded parameters, three parameters more, and the pages of four pieces.

    Args:
      slots: The parameters; their values are not read.
      stored: The result of `read_headers` or `read_tensors`.
      dtype: The dtype of the parameters. None: the dtype in the file, with float32 for float64, and the wider dtype if
        the tensors of a parameter differ.
      progress_fn: Called after each parameter with the numbers of weights loaded and of all.
      ahead: The result of `copy_ahead`; emptied.

    Raises:
      ValueError: See `check`.
    """
    check(slots, stored)
    buffers, left = ({}, {}) if ahead is None else _end(ahead)
    buffers |= {i: slot.in_file for i, slot in enumerate(slots) if slot.in_file is not None}
    # Not the sizes of buffers: values in a file begin before their tensor.
    sizes = [sum(map(math.prod, slot.tensors.values())) for slot in slots]
    begun: collections.deque[tuple[nnx.Param, np.ndarray, list[Future]]] = collections.deque()
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as pool:
        try:
            for i in range(len(slots) + _AHEAD):
                if i < len(slots):
                    if i in buffers:
                        buffer, pieces = buffers.pop(i), left.pop(i, [])
                    else:
                        buffer = _aligned(slots[i].param.shape, loaded_dtype(slots[i], stored, dtype))
                        pieces = _pieces(slots[i], stored, buffer)
                    begun.append((slots[i].param, buffer, [pool.submit(_copy, *piece) for piece in pieces]))
                if i >= _AHEAD:
                    param, buffer, copies = begun.popleft()
                    for copy in copies:
                        copy.result()
                    # In this thread, because `jax.default_device` holds for one thread.
                    param.set_value(jax.block_until_ready(jax.device_put(buffer)))
                    if progress_fn is not None:
                        progress_fn(sum(sizes[: i - _AHEAD + 1]), sum(sizes))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _end(ahead: Ahead) -> tuple[dict[int, np.ndarray], dict[int, list[Piece]]]:
    """Ends the thread, and returns the buffers and the pieces that it did not copy, by the index of their slot."""
    ahead.stop.set()
    if ahead.thread.ident is not None:
        ahead.thread.join()
    # A second load, after one that failed, must not take a buffer whose pieces the first one took.
    buffers, left = dict(ahead.buffers), {}
    ahead.buffers.clear()
    while ahead.pieces:
        i, piece = ahead.pieces.popleft()
        left.setdefault(i, []).append(piece)
    return buffers, left


def _pieces(slot: Slot, stored: Mapping[str, Stored | Quantized], buffer: np.ndarray) -> Iterator[Piece]:
    """Yields the pieces that fill the buffer of a parameter."""
    rows, begin = buffer.T if slot.transposed else buffer, 0
    for entry in [stored[name] for name in slot.tensors]:
        num_rows, row_size = entry.shape[0], math.prod(entry.shape[1:])
        step = max(_PIECE // max(row_size, 1) // _ROWS, 1) * _ROWS
        for i in range(0, num_rows, step):
            piece = slice(i, min(i + step, num_rows))
            yield Piece(entry, piece, rows[begin + piece.start : begin + piece.stop])
        begin += num_rows


def _copy(entry: Stored | Quantized, piece: slice, out: np.ndarray) -> None:
    """Copies the rows `piece` of a tensor into `out`, which may be a transpose, and converts them to its dtype."""
    scratch = None
    if out.ndim == 2 and not out.flags.c_contiguous:
        scratch = np.empty((_ROWS, _COLUMNS + _PADDING), out.dtype)
    with entry.mapped() as values:
        for i in range(piece.start, piece.stop, _ROWS):
            block = values[i : min(i + _ROWS, piece.stop)]
            target = out[i - piece.start :][: len(block)]
            if scratch is None:
                _convert(block, target)
            else:
                _transpose(block, target, scratch)
            del block
        del values


def _transpose(block: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """Copies rows to the columns of the array whose transpose `out` is."""
    for i in range(0, block.shape[1], _COLUMNS):
        part, target = block[:, i : i + _COLUMNS], out[:, i : i + _COLUMNS]
        rows = scratch[: part.shape[0], : part.shape[1]]
        _convert(part, rows)
        _convert(rows, target)


def _convert(values: np.ndarray, out: np.ndarray) -> None:
    """Copies `values` to `out` in its dtype.

    As integers: NumPy keeps the lock of the interpreter while it copies or converts bfloat16.
    """
    if values.dtype == jnp.bfloat16 and out.dtype == np.float32:
        np.left_shift(values.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    elif values.dtype == out.dtype:
        bits = f"u{out.dtype.itemsize}"
        out.view(bits)[...] = values.view(bits)
    else:
        out[...] = values


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at an address that XLA uses without a copy."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + num_bytes].view(dtype).reshape(shape)
