"""Device times of the kernels and of the XLA core, by the profiler (CUPTI), inputs rotated past the L2.

    python bench/gpu/timings.py OUT.json SECONDS 0/6     # the first of every six points: six processes share the work
    python bench/gpu/timings.py OUT.json SECONDS host

A time is how long at least one kernel of a call runs, as median over calls: overlapping kernels count once, and gaps
between launches do not count. With `host`, a time is that of many calls in flight by the host's clock, divided by their
number; it includes dispatch.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import os
import pathlib
import statistics
import sys
import tempfile
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import paper
import results
from kernel_inputs import NAMES, TIMED, VOCABULARIES, make

from pallas_kernels import token as two_launches
from pallas_kernels import token_early_exit as early_exit
from pallas_kernels.config import Config
from specsamp_jax.rules import kernels, sigmoid, token

ROTATED = 240e6
"""Bytes of inputs in rotation: four times the L2."""

WIDE = {"alpha": -1e4, "beta": 1e4}
CORES = {
    "kernel": kernels.verify_token,
    "xla": token.verify_token,
    "paper's baseline": paper.baseline,
    "paper's exact": paper.exact,
    # Tokens and number of accepted drafts only: the log-probabilities would read all rows.
    "sigmoid kernel": lambda *args: kernels.verify_sigmoid(*args, **WIDE)[:2],
    "sigmoid xla": lambda *args: sigmoid.verify_sigmoid(*args, **WIDE)[:2],
}
VARIANTS = {
    1: [(two_launches, 16), (two_launches, 38)],
    8: [(two_launches, 16), (two_launches, 30)],
    64: [(two_launches, 4), (two_launches, 16), (early_exit, 8)],
    256: [(two_launches, 2), (two_launches, 8), (early_exit, 4)],
}
"""Other kernels and blocks per sequence, by batch size, timed at the first vocabulary with normalizers handed over."""


def measure_copy():
    """Bytes per second of a copy on this card, bytes read plus bytes written."""
    x = jnp.zeros((2**30,), jnp.bfloat16)
    us = measure(jax.jit(lambda x: x + 1).lower(x).compile(), [(x,)], 20)["us"]
    return 2 * x.nbytes / us * 1e6


@contextlib.contextmanager
def alone_on_the_gpu():
    """Waits until no other process of the file LOCK measures."""
    with open(os.environ.get("LOCK", os.devnull), "w") as file:
        if "LOCK" in os.environ:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def launches_of(fn, sets, rounds):
    """Start, end and name of every kernel of some calls, in nanoseconds, in the order of their starts."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([fn(*s) for _ in range(rounds) for s in sets])
        data = jax.profiler.ProfileData.from_file(str(next(pathlib.Path(folder).rglob("*.xplane.pb"))))
    lines = [line for plane in data.planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    streams = [line for line in lines if line.name.startswith("Stream")]
    return sorted((e.start_ns, e.start_ns + e.duration_ns, e.name) for line in streams for e in line.events)


def busy(launches):
    """Nanoseconds during which at least one of the launches runs."""
    total, until = 0, 0
    for start, end, _ in launches:
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total


def measure(fn, sets, rounds):
    """Launches of one call and the median of the calls' device times, in microseconds."""
    jax.block_until_ready([fn(*s) for s in sets])
    launches, calls = launches_of(fn, sets, rounds), rounds * len(sets)
    each = len(launches) // calls
    # If calls differ in their number of launches, they cannot be told apart: use the mean.
    if each * calls != len(launches):
        us = round(busy(launches) / calls / 1e3, 2)
        return {"us": us, "launches": round(len(launches) / calls, 1)}
    parts = [launches[i * each : (i + 1) * each] for i in range(calls)]
    times = [busy(part) / 1e3 for part in parts]
    return {"us": round(statistics.median(times), 2), "launches": each}


def measure_host(fn, sets, rounds):
    """The host's clock over many calls in flight, divided by their number: dispatch included."""
    jax.block_until_ready([fn(*s) for s in sets])
    start = time.perf_counter()
    jax.block_until_ready([fn(*s) for _ in range(rounds) for s in sets])
    return {"us": round(1e6 * (time.perf_counter() - start) / (rounds * len(sets)), 1)}


def maker(point):
    """The function of a key that makes the inputs of one point."""
    return functools.partial(make, **dict(zip(NAMES, point, strict=True)))


def compiled_maker(point):
    """Compiled `random_inputs`, so that the GPU does not wait for the host."""
    return jax.jit(maker(point)).lower(jax.eval_shape(lambda: jax.random.key(0))).compile()


def num_sets(size):
    """Number of inputs of this size that together exceed the L2."""
    return int(min(64, max(2, -(-ROTATED // size))))


def make_sets(point, make_one):
    """Sets of inputs that together exceed the L2."""
    batch_size, num_draft, vocab_size, dtype, _ = point
    size = batch_size * (2 * num_draft + 1) * vocab_size * jnp.dtype(dtype).itemsize
    return [make_one(jax.random.key(i)) for i in range(num_sets(size))]


def contenders(point):
    """Functions to time at one point, by name."""
    batch_size, _, vocab_size, _, kind = point
    names = [n for n in CORES if kind == "logits" or not n.startswith("paper")]
    names = [n for n in names if kind == "normalizers" or not n.startswith("sigmoid")]
    found: dict[str, Any] = {name: CORES[name] for name in names}
    if vocab_size == VOCABULARIES[0] and kind == "normalizers":
        for module, blocks in VARIANTS[batch_size]:
            name = f"kernel, {blocks} blocks{', early exit' * (module is early_exit)}"
            options = {"kernel": module.verify_token, "config": Config(blocks)}
            found[name] = functools.partial(kernels.verify_token, **options)
    return found


def compiled(point, wanted):
    """The contenders compiled, as many at a time as the machine has cores."""
    args = jax.eval_shape(maker(point), jax.random.key(0))
    lowered = {name: jax.jit(fn).lower(*args) for name, fn in wanted.items()}
    return {name: POOL.submit(program.compile) for name, program in lowered.items()}


POOL = concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def main():
    path, deadline, part = sys.argv[1], time.time() + float(sys.argv[2]), sys.argv[3]
    about: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    rows: list[list[Any]] = []
    points, measure_fn = [p for p in TIMED if p[4] == "normalizers" and p[1] == 4][:3], measure_host
    if part != "host":
        index, count = map(int, part.split("/"))
        points, measure_fn = TIMED[index::count], measure
    for index, point in enumerate(points):
        if time.time() > deadline:
            print("out of time before", point)
            break
        wanted = contenders(point)
        if measure_fn is measure_host:
            wanted = {name: wanted[name] for name in ("kernel", "xla")}
        make_one = POOL.submit(compiled_maker, point)
        programs = compiled(point, wanted)
        found: dict[str, list[float]] = {}
        rows.append([*point, found])
        programs = {name: program.result() for name, program in programs.items()}
        make_one = make_one.result()
        # Other processes compile meanwhile, but one at a time uses the GPU.
        with open("/tmp/specsamp-gpu.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if index == 0 and measure_fn is measure:
                about["copy"] = measure_copy()
            sets = make_sets(point, make_one)
            for name, program in programs.items():
                try:
                    found[name] = list(measure_fn(program, sets, max(2, 24 // len(sets))).values())
                except Exception:
                    traceback.print_exc()
                    print("no time of", point, name, flush=True)
            jax.block_until_ready(sets)
            del sets
        print(point, found, flush=True)
        results.write(path, about, rows)


if __name__ == "__main__":
    main()
