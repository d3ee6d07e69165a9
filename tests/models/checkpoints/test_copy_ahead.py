"""Parameters that are copied while programs are compiled, also into memory that was touched before."""

import itertools
import threading
import time

import jax
import numpy as np
import pytest
from flax import nnx
from processes import process
from small_llama import make_llama

from specsamp_jax.models import load_module, save_checkpoint
from specsamp_jax.models.checkpoints import slots
from specsamp_jax.models.checkpoints.folder import begin_all, open_checkpoint

pytestmark = pytest.mark.optimised(False)


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A checkpoint whose parameters are all large enough to be copied ahead."""
    save_checkpoint(tmp_path, make_llama(), dtype="float32")
    monkeypatch.setattr(slots, "_PIECE", 16)
    return tmp_path


class Memory:
    """Memory of a few bytes, which counts what is taken of it."""

    def __init__(self, size):
        self.bytes = np.zeros(size + 64, np.uint8)
        self.end = self.begin = -self.bytes.ctypes.data % 64
        self.size, self.released = self.begin + size, False

    def take(self, num_bytes):
        if self.end + num_bytes > self.size:
            return None
        view = memoryview(self.bytes)[self.end : self.end + num_bytes]
        self.end += -(-num_bytes // 64) * 64
        return view

    def release(self):
        self.released = True


def assert_equal_weights(module, folder, dtype=None):
    loaded = (jax.tree.leaves(nnx.to_pure_dict(nnx.state(each))) for each in (module, load_module(folder, dtype=dtype)))
    for x, y in zip(*loaded, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def address(array):
    return np.asarray(array).ctypes.data


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_of_the_weights_is_copied_and_becomes_parameters(saved, dtype):
    (checkpoint,) = begin_all([open_checkpoint(saved, dtype=dtype)])
    checkpoint.ahead.thread.join()
    assert not checkpoint.ahead.pieces
    buffers = dict(checkpoint.ahead.buffers)
    total = sum(np.dtype(checkpoint.dtype).itemsize * slot.param.size for slot in checkpoint.slots)
    assert 0.3 * total <= sum(buffer.nbytes for buffer in buffers.values()) <= 0.5 * total
    copies = {i: buffer.copy() for i, buffer in buffers.items()}
    module = checkpoint.load_module()
    assert not checkpoint.ahead.buffers
    for i, buffer in buffers.items():
        assert address(checkpoint.slots[i].param[...]) == address(buffer)
        np.testing.assert_array_equal(copies[i], buffer)
    assert_equal_weights(module, saved, dtype)


def test_a_load_copies_the_pieces_that_are_left(saved, monkeypatch):
    monkeypatch.setattr(slots, "_ROWS", 4)
    begun, copy, threads = threading.Event(), slots._copy, []

    def wait(*arguments):
        threads.append(threading.current_thread())
        if len(threads) == 3:
            begun.set()
            checkpoint.ahead.stop.wait(60)
        copy(*arguments)

    monkeypatch.setattr(slots, "_copy", wait)
    checkpoint = open_checkpoint(saved)
    (checkpoint,) = begin_all([checkpoint])
    assert begun.wait(60)
    num_left = len(checkpoint.ahead.pieces)
    assert num_left > 1
    assert_equal_weights(checkpoint.load_module(), saved)
    assert threads.count(checkpoint.ahead.thread) == 3


def test_a_load_after_one_that_failed_copies_all(saved, monkeypatch):
    monkeypatch.setattr(slots, "_ROWS", 4)
    monkeypatch.setattr(slots, "_copy_pieces", lambda pieces, stop: None)
    (checkpoint,) = begin_all([open_checkpoint(saved)])
    for buffer in checkpoint.ahead.buffers.values():
        buffer[...] = -7

    def fail(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.load_module(fail)
    assert_equal_weights(checkpoint.load_module(), saved)


def test_memory_that_was_touched_is_taken_and_the_rest_released(saved):
    (checkpoint,) = begin_all([open_checkpoint(saved)], Memory(0))
    total = sum(buffer.nbytes for buffer in checkpoint.ahead.buffers.values())
    memory = Memory(2 * total // 3)
    (checkpoint,) = begin_all([open_checkpoint(saved)], memory)
    assert memory.released
    begin = memory.bytes.ctypes.data
    inside = {
        i: buffer for i, buffer in checkpoint.ahead.buffers.items() if 0 <= address(buffer) - begin < memory.bytes.size
    }
    assert 0 < len(inside) < len(checkpoint.ahead.buffers)
    assert all(address(buffer) % 64 == 0 for buffer in checkpoint.ahead.buffers.values())
    module = checkpoint.load_module()
    for i, buffer in inside.items():
        assert address(checkpoint.slots[i].param[...]) == address(buffer)
    assert_equal_weights(module, saved)


def test_two_checkpoints_share_the_memory(saved):
    memory = Memory(1 << 20)
    checkpoints = begin_all([open_checkpoint(saved), open_checkpoint(saved)], memory)
    places = [(address(b), b.nbytes) for each in checkpoints for b in each.ahead.buffers.values()]
    places.sort()
    assert all(begin + size <= following for (begin, size), (following, _) in itertools.pairwise(places))
    for each in checkpoints:
        assert_equal_weights(each.load_module(), saved)


def test_without_a_thread_the_load_copies_all(saved, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", fail)
        (checkpoint,) = begin_all([open_checkpoint(saved)])
    assert checkpoint.ahead.pieces
    assert_equal_weights(checkpoint.load_module(), saved)


def test_elsewhere_than_on_a_cpu_the_memory_is_released(saved, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    memory = Memory(1 << 20)
    (checkpoint,) = begin_all([open_checkpoint(saved)], memory)
    assert memory.released
    assert memory.end == memory.begin
    assert checkpoint.ahead is None


def test_a_process_ends_at_once_while_weights_are_copied(saved):
    code = f"""
import sys, time
from specsamp_jax.models.checkpoints import slots
from specsamp_jax.models.checkpoints.folder import begin_all, open_checkpoint
slots._PIECE, slots._ROWS = 16, 1
slots._copy = lambda *arguments: time.sleep(1)
(checkpoint,) = begin_all([open_checkpoint({str(saved)!r})])
assert len(checkpoint.ahead.pieces) > 100
print(time.time(), flush=True)
sys.exit(3)
"""
    result = process(code)
    assert (result.returncode, result.stderr) == (3, "")
    assert time.time() - float(result.stdout) < 10
