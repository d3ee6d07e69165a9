"""Size of compiled programs, and memory that a process returns after a compilation."""

import ctypes
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from specsamp_jax import _resident
from specsamp_jax._resident import Mapping, unchanged

CODE = """\
7f0000000000-7f0004000000 {mode} 00001000 08:01 {inode}   /lib/large.so
Size:              65536 kB
Rss:               {resident} kB
Private_Dirty:         {dirty} kB
Anonymous:             0 kB
Swap:             {swap} kB
VmFlags: rd ex mr mw me
7f0005000000-7f0005001000 rw-p 00000000 00:00 0
Rss:                   4 kB
Private_Dirty:         4 kB
"""
LARGE = {"mode": "r-xp", "inode": 17, "resident": 40_000, "dirty": 0, "swap": 0}


def found(**changes):
    return unchanged(CODE.format(**LARGE | changes).splitlines())


@pytest.mark.parametrize("mode", ["r-xp", "r--p"])
def test_code_and_constants_of_a_large_library_are_found(mode):
    assert found(mode=mode) == [Mapping(0x7F0000000000, 0x7F0004000000, mode, 17, 40_000 << 10, 0)]


@pytest.mark.parametrize("change", [{"mode": "rwxp"}, {"inode": 0}, {"resident": 90}, {"dirty": 4}, {"swap": 4}])
def test_no_other_pages_are_given_back(change):
    # Code without a file is compiled, and changed pages would be lost: addresses that the linker wrote, for example.
    assert found(**change) == []


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="malloc_trim is glibc's")
def test_freed_memory_of_another_thread_is_given_back():
    def anonymous():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

    def fill_and_free():
        # Blocks too small for a mapping of their own, between others that keep malloc from returning them itself.
        blocks = [(bytearray(100_000), bytearray(1000)) for _ in range(500)]
        kept.extend(small for _, small in blocks)
        blocks.clear()
        freed.set()
        done.wait()

    kept, freed, done = [], threading.Event(), threading.Event()
    thread = threading.Thread(target=fill_and_free)
    thread.start()
    freed.wait()
    before = anonymous()
    _resident.trim()
    after = anonymous()
    done.set()
    thread.join()
    assert after < before - 40e6


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_compilers_code_is_given_back_and_runs_again():
    def resident_code():
        lines = Path("/proc/self/smaps").read_text().splitlines()
        return sum(mapping.resident for mapping in unchanged(lines))

    jax.jit(lambda x: jnp.cos(x) + 1)(1.0)
    before = resident_code()
    _resident.release()
    assert resident_code() < before / 2
    assert jax.jit(lambda x: jnp.cos(x) + 2)(0.0) == 3
