"""Device times of the kernels and of the XLA core, by CUPTI, inputs rotated past the L2.

    python bench/gpu/timings.py OUT.json SECONDS [PART OF A POINT]
    python bench/gpu/timings.py OUT.json SECONDS host

A time is the sum of the device times of a call's kernels, the median over calls; gaps between launches are not
in it. With `host` it is the host's clock over many calls in flight, divided by their number: dispatch included.
"""

import concurrent.futures
import functools
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import paper
from inputs import make
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import _config as config
from specsamp_jax._rules import pallas, sigmoid, token

ROTATED = 240e6
"""Bytes of inputs in rotation: four times the L2."""

BANDWIDTH = 4.3e12
"""Bytes a second that others measured on an H200, read and written: the floor's only ingredient."""

WIDE = {"alpha": -1e4, "beta": 1e4}
CORES = {
    "kernel": pallas.verify_token,
    "xla": token.verify_token,
    "paper's baseline": paper.baseline,
    "paper's exact": paper.exact,
    # What is decided, without log_probs: those read all rows.
    "sigmoid kernel": lambda *args: pallas.verify_sigmoid(*args, **WIDE)[:2],
    "sigmoid xla": lambda *args: sigmoid.verify_sigmoid(*args, **WIDE)[:2],
}
VOCABULARIES = 151936, 32000, 51864, 128256, 256000
POINTS = [
    (batch_size, num_draft, vocab_size, dtype, kind)
    for dtype in ("bfloat16", "float32")
    for vocab_size in VOCABULARIES
    for num_draft in (4, 8)
    for batch_size in (1, 8, 64, 256)
    for kind in ("normalizers", "logits")
    # The rest of the table reads the draft's rows at one K only.
    if kind == "normalizers" or num_draft == 4
]
VARIANTS = {
    1: [config.Config(cluster) for cluster in (8, 16)],
    8: [config.Config(cluster) for cluster in (4, 8, 16)],
    64: [config.Config(cluster) for cluster in (2, 4, 8)] + [config.Config(8, early_exit=True)],
    256: [config.Config(cluster, True) for cluster in (2, 4, 8)] + [config.Config(cluster) for cluster in (1, 2)],
}
"""Other block sizes, by batch size, timed at the first vocabulary with normalizers handed over."""


def floor_us(batch_size, num_draft, vocab_size, dtype, kind, name="kernel"):
    """Time of the bytes that must be read: all rows once, or the target's, and a pair again after a rejection.

    Of the sigmoid rule one row: with a wide sigmoid nearly every draft is accepted.
    """
    rows = 2 * num_draft + 1 if kind == "logits" else num_draft + 1 + 2 * (1 - 0.8**num_draft)
    rows = 1 if name.startswith("sigmoid") else rows
    return 1e6 * batch_size * rows * vocab_size * jnp.dtype(dtype).itemsize / BANDWIDTH


def measure(fn, sets, rounds):
    """Launches of one call and the median of the calls' device times, in microseconds."""
    jax.block_until_ready([fn(*s) for s in sets])
    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext  # pyright: ignore[reportPrivateImportUsage]
    cupti._cupti_init()
    try:
        jax.block_until_ready([fn(*s) for _ in range(rounds) for s in sets])
    finally:
        launches = cupti._cupti_get_timings(True)
    calls = rounds * len(sets)
    each = len(launches) // calls
    # Where a branch is taken in some calls only, there is no call to tell apart: the mean.
    if each * calls != len(launches):
        times = [1e3 * sum(ms for _, ms in launches) / calls]
        return {"us": round(times[0], 2), "mean": True, "launches": round(len(launches) / calls, 1), "kernels": []}
    parts = [launches[i * each : (i + 1) * each] for i in range(calls)]
    times = [1e3 * sum(ms for _, ms in part) for part in parts]
    names = [
        (name[:40], round(1e3 * statistics.median(part[i][1] for part in parts), 2))
        for i, (name, _) in enumerate(parts[0])
    ]
    return {
        "us": round(statistics.median(times), 2),
        "fastest_us": round(min(times), 2),
        "launches": each,
        "kernels": names,
    }


def measure_host(fn, sets, rounds):
    """The host's clock over many calls in flight, divided by their number: dispatch included."""
    jax.block_until_ready([fn(*s) for s in sets])
    start = time.perf_counter()
    jax.block_until_ready([fn(*s) for _ in range(rounds) for s in sets])
    return {"back_to_back_us": round(1e6 * (time.perf_counter() - start) / (rounds * len(sets)), 1)}


def make_sets(point):
    batch_size, num_draft, vocab_size, dtype, kind = point
    size = batch_size * (2 * num_draft + 1) * vocab_size * jnp.dtype(dtype).itemsize
    count = int(min(64, max(2, -(-ROTATED // size))))
    return [make(jax.random.key(i), batch_size, num_draft, vocab_size, jnp.dtype(dtype), kind) for i in range(count)]


def contenders(point):
    """Names and functions for one point; a function of its own for each, so that none is a trace of another."""
    batch_size, _, vocab_size, _, kind = point
    names = [n for n in CORES if kind == "logits" or not n.startswith("paper")]
    names = [n for n in names if kind == "normalizers" or not n.startswith("sigmoid")]
    found: dict[str, Any] = {name: (CORES[name], None) for name in names}
    if vocab_size == VOCABULARIES[0] and kind == "normalizers":
        for variant in VARIANTS[batch_size]:
            if variant != config.choose(*point[:3]):
                name = f"kernel, cluster {variant.cluster}{', early exit' * variant.early_exit}"
                found[name] = lambda *args: pallas.verify_token(*args), variant
    return found


def compiled(point, wanted):
    """The contenders compiled, as many at a time as the machine has cores."""
    args = jax.eval_shape(
        functools.partial(
            make, batch_size=point[0], num_draft=point[1], vocab_size=point[2], dtype=jnp.dtype(point[3]), kind=point[4]
        ),
        jax.random.key(0),
    )
    lowered = {}
    choose = config.choose
    for name, (fn, variant) in wanted.items():
        if variant is not None:
            config.choose = lambda *_, variant=variant: variant
        try:
            lowered[name] = jax.jit(fn).lower(*args)
        finally:
            config.choose = choose
    return {name: POOL.submit(program.compile) for name, program in lowered.items()}


POOL = concurrent.futures.ThreadPoolExecutor(os.cpu_count())


def main():
    path, deadline = sys.argv[1], time.time() + float(sys.argv[2])
    select, measure_fn = (sys.argv[3], measure) if sys.argv[3:] != ["host"] else ("", measure_host)
    points = [p for p in POINTS if select in "-".join(map(str, p))]
    if measure_fn is measure_host:
        points = [p for p in POINTS[:15] if p[4] == "normalizers" and p[1] == 4]
    rows = []

    def record(row):
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "kernels"}), flush=True)
        with open(path, "w") as file:
            about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            json.dump(about | {"xla_flags": os.environ.get("XLA_FLAGS", ""), "rows": rows}, file, indent=1)

    waiting = {point: compiled(point, contenders(point)) for point in points[:2]}
    for index, point in enumerate(points):
        if time.time() > deadline:
            print("out of time before", point)
            break
        for later in points[index + 1 : index + 4]:
            if later not in waiting:
                waiting[later] = compiled(later, contenders(later))
        sets = make_sets(point)
        for name, program in waiting.pop(point).items():
            row = {"point": point, "name": name, "floor_us": round(floor_us(*point, name=name), 2)}
            try:
                row |= measure_fn(program.result(), sets, max(2, 24 // len(sets)))
            except Exception as error:
                traceback.print_exc()
                row["error"] = repr(error)[:300]
            record(row)
        del sets

    print("\n   B  K       V type      draft        what                              us    floor  times launches")
    for row in rows:
        b, k, v, dtype, kind = row["point"]
        start = f"{b:4} {k:2} {v:7} {dtype:9} {kind:12} {row['name']:26}"
        if "us" in row:
            times = row["us"] / row["floor_us"]
            print(f"{start} {row['us']:9.2f} {row['floor_us']:8.2f} {times:6.2f} {row['launches']:8}")
        else:
            print(start, row.get("error", row.get("back_to_back_us")))


if __name__ == "__main__":
    main()
