"""Memory that `specsamp generate` touches before it imports JAX."""

import io
import mmap
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import process

import specsamp
from specsamp_jax.models.checkpoints import slots

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is touched on Linux only")

SIZE = 256 << 20


@pytest.fixture(autouse=True)
def _without_accelerators(monkeypatch):
    monkeypatch.setattr(specsamp, "_ACCELERATORS", ())


def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def sparse(folder, size, name="model.safetensors"):
    """A folder with a file of this size that takes no disk."""
    folder.mkdir(exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(size)
    return str(folder)


def touched(memory):
    memory._thread.join()
    return memory


@pytest.mark.parametrize(
    ("arguments", "folders"),
    [
        ("generate --target a --draft b --prompt x", ["a", "b"]),
        ("generate --draft=b --target=a", ["b", "a"]),
        ("generate --target a --target c --prompt x", ["c"]),
        ("generate --target", [""]),
        ("generate --target=", [""]),
        ("generate --draft b", []),
        ("generate --help --target a", []),
        ("generate --target a -h", []),
        ("generate", []),
        ("demo --target a", []),
        ("--target a generate", []),
        ("", []),
    ],
)
def test_folders_of_a_command(arguments, folders):
    assert specsamp.weight_folders(arguments.split()) == folders


def test_nothing_is_touched_without_large_weights(tmp_path):
    (tmp_path / "file").write_text("no folder")
    names = ["", "file", "none", "a\0b", "x" * 5000, "ngram", str(tmp_path), str(tmp_path / "file"), "/dev/null"]
    names.append(sparse(tmp_path / "small", 2 * specsamp._SMALLEST - 1))
    names.append(sparse(tmp_path / "other", SIZE, "optimizer.safetensors"))
    names.append(sparse(tmp_path / "too large", 1 << 43))
    for name in names:
        assert specsamp.touch([name]) is None, name
    assert specsamp.touch([]) is None


def test_nothing_is_touched_beside_an_accelerator_or_without_a_number_of_free_bytes(tmp_path, monkeypatch):
    folder = sparse(tmp_path / "large", SIZE)
    with monkeypatch.context() as patch:
        patch.setattr(specsamp, "_ACCELERATORS", ("/dev/none", "/dev/null"))
        assert specsamp.touch([folder]) is None
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO("MemTotal: 1 kB\n"))
    assert specsamp.touch([folder]) is None


@pytest.mark.parametrize("error", [OSError, MemoryError, ValueError])
def test_without_memory_nothing_is_touched(tmp_path, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(mmap, "mmap", fail)
    assert specsamp.touch([sparse(tmp_path, SIZE)]) is None


def test_without_a_thread_nothing_is_touched(tmp_path, monkeypatch):
    def fail(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert specsamp.touch([sparse(tmp_path, SIZE)]) is None


def test_half_of_the_weights_is_touched(tmp_path):
    before = resident()
    folders = [sparse(tmp_path / "a", SIZE), sparse(tmp_path / "b", SIZE)]
    memory = touched(specsamp.touch(folders))
    assert 0.9 * SIZE < resident() - before < 1.1 * SIZE
    memory.release()
    assert resident() - before < 0.1 * SIZE
    assert memory.take(1) is None


def test_what_is_taken_is_aligned_and_stays(tmp_path):
    before = resident()
    memory = touched(specsamp.touch([sparse(tmp_path, SIZE)]))
    views = [memory.take(size) for size in (100, 1 << 20, 1, SIZE // 4)]
    assert memory.take(SIZE // 4) is None
    for i, view in enumerate(views):
        view[:] = bytes([i + 1]) * len(view)
    memory.release()
    assert resident() - before < 0.4 * SIZE
    import numpy as np

    for i, view in enumerate(views):
        array = np.frombuffer(view, np.uint8)
        assert array.ctypes.data % slots.ALIGNMENT == 0
        assert (array == i + 1).all()
    del memory, views, view, array
    assert resident() - before < 0.1 * SIZE


def test_the_thread_ends_when_memory_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(specsamp, "_CHUNK", 1 << 20)
    memory = specsamp.touch([sparse(tmp_path, 4 << 30)])
    view = memory.take(1 << 19)
    assert not memory._thread.is_alive()
    assert view is None or len(view) == 1 << 19
    memory.release()


MAIN = """
import click, os, signal, sys, time, types, specsamp
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job ignores it.
@click.command()
@click.option("--target")
@click.pass_obj
def generate_command(memory, target):
    assert memory is not None and memory._thread.is_alive()
    print(time.time(), flush=True)
    {end}
sys.modules["specsamp_jax.cli.generate"] = types.SimpleNamespace(generate_command=generate_command)
sys.modules["specsamp_jax.cli"] = sys.modules["specsamp_jax"] = types.ModuleType("specsamp_jax")
specsamp._available_bytes = lambda: 1 << 40
specsamp.main()
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("os.kill(os.getpid(), signal.SIGINT)", 130), ("pass", 0), ("raise ValueError('wrong')", 2), ("sys.exit(3)", 3)],
)
def test_the_command_ends_at_once_while_memory_is_touched(tmp_path, end, status):
    result = process(MAIN.format(end=end), "generate", "--target", sparse(tmp_path, 8 << 30))
    assert result.returncode == status, result.stderr
    assert result.stderr in ("", "\n", "specsamp: wrong\n")
    assert time.time() - float(result.stdout) < 1.5  # 4 GB take three seconds and more


def test_a_signal_before_the_command_ends_it_while_memory_is_touched(tmp_path):
    code = MAIN.format(end="pass").replace(
        "specsamp.main()",
        """
import importlib
importlib.import_module = lambda name: os.kill(os.getpid(), signal.SIGINT)
specsamp.main()""",
    )
    result = process(code, "generate", "--target", sparse(tmp_path, 8 << 30))
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_a_process_that_forgets_the_memory_ends_at_once(tmp_path):
    code = """
import sys, time, specsamp
specsamp._available_bytes = lambda: 1 << 40
memory = specsamp.touch(sys.argv[1:])
assert memory is not None and memory._thread.is_alive()
print(time.time(), flush=True)
"""
    result = process(code, sparse(tmp_path, 8 << 30))
    assert (result.returncode, result.stderr) == (0, "")
    assert time.time() - float(result.stdout) < 1


def test_a_command_that_fails_releases_the_memory(tmp_path, run, monkeypatch):
    memories, touch = [], specsamp.touch
    monkeypatch.setattr(specsamp, "touch", lambda folders: memories.append(touch(folders)) or memories[-1])
    status, _, message = run("generate", "--target", sparse(tmp_path, SIZE), "--prompt", "a")
    assert status == 2, message
    assert not memories[0]._thread.is_alive()
    assert memories[0].take(1) is None
