"""Device times of the kernels and of the XLA core, by CUPTI, inputs rotated past the L2.

    python bench/gpu/timings.py OUT.json SECONDS

A time is the sum of the device times of a call's kernels, the median over calls; gaps between launches are not
in it. `back to back` is the host's clock over many calls in flight, divided by their number: dispatch included.
"""

import json
import statistics
import sys
import time
import traceback

import jax
import jax.numpy as jnp
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
    # What is decided, without log_probs: those read all rows.
    "sigmoid kernel": lambda *args: pallas.verify_sigmoid(*args, **WIDE)[:2],
    "sigmoid xla": lambda *args: sigmoid.verify_sigmoid(*args, **WIDE)[:2],
}
POINTS = [
    (64, 4, 151936, "bfloat16", "normalizers"),
    (64, 4, 151936, "bfloat16", "logits"),
    (1, 4, 151936, "bfloat16", "normalizers"),
    (8, 4, 151936, "bfloat16", "normalizers"),
    (256, 8, 151936, "bfloat16", "normalizers"),
    (8, 4, 151936, "bfloat16", "logits"),
    (64, 4, 32000, "bfloat16", "normalizers"),
    (64, 4, 51865, "bfloat16", "normalizers"),
    (64, 4, 128256, "float32", "logits"),
    (64, 4, 51864, "bfloat16", "normalizers"),
    (64, 4, 256000, "bfloat16", "normalizers"),
    (256, 8, 32000, "bfloat16", "logits"),
]
VARIANTS = {
    (1, 4, 151936): [config.Config(8), config.Config(16)],
    (8, 4, 151936): [config.Config(8), config.Config(16)],
    (64, 4, 151936): [config.Config(cluster) for cluster in (4, 6, 8)],
    (256, 8, 151936): [config.Config(cluster, early_exit) for early_exit in (True, False) for cluster in (1, 2, 4)],
}
"""Other block sizes, timed with normalizers handed over."""


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
    if each * calls != len(launches):
        raise RuntimeError(f"{len(launches)} launches in {calls} calls")
    parts = [launches[i * each : (i + 1) * each] for i in range(calls)]
    times = [1e3 * sum(ms for _, ms in part) for part in parts]
    names = [
        (name[:40], round(1e3 * statistics.median(part[i][1] for part in parts), 2))
        for i, (name, _) in enumerate(parts[0])
    ]
    start = time.perf_counter()
    jax.block_until_ready([fn(*s) for _ in range(rounds) for s in sets])
    host = 1e6 * (time.perf_counter() - start) / calls
    return {
        "us": round(statistics.median(times), 2),
        "fastest_us": round(min(times), 2),
        "launches": each,
        "kernels": names,
        "back_to_back_us": round(host, 1),
    }


def make_sets(point):
    batch_size, num_draft, vocab_size, dtype, kind = point
    size = batch_size * (2 * num_draft + 1) * vocab_size * jnp.dtype(dtype).itemsize
    count = int(min(64, max(2, -(-ROTATED // size))))
    return [make(jax.random.key(i), batch_size, num_draft, vocab_size, jnp.dtype(dtype), kind) for i in range(count)]


def main():
    path, deadline = sys.argv[1], time.time() + float(sys.argv[2])
    rows = []

    def record(row):
        rows.append(row)
        print(json.dumps(row), flush=True)
        with open(path, "w") as file:
            json.dump({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}, file, indent=1)

    def run(point, name, fn, sets):
        row = {"point": point, "name": name, "floor_us": round(floor_us(*point, name=name), 2)}
        try:
            row |= measure(jax.jit(fn), sets, max(2, 24 // len(sets)))
        except Exception as error:
            traceback.print_exc()
            row["error"] = repr(error)[:300]
        record(row)

    choose = config.choose
    for point in POINTS:
        if time.time() > deadline:
            print("out of time before", point)
            break
        sets = make_sets(point)
        for name, core in CORES.items():
            run(point, name, core, sets)
        for chosen in VARIANTS.get(point[:3], []) if point[4] == "normalizers" else []:
            if chosen == choose(*point[:3]) or time.time() > deadline:
                continue
            config.choose = lambda *_, chosen=chosen: chosen
            name = f"kernel, {chosen.cluster} blocks{' early' * chosen.early_exit}"
            # A function of its own, so that it is traced again.
            run(point, name, lambda *a: pallas.verify_token(*a), sets)
            config.choose = choose
        del sets

    print("\n   B  K       V type      draft        what                        us    floor  times launches   b2b us")
    for row in rows:
        b, k, v, dtype, kind = row["point"]
        start = f"{b:4} {k:2} {v:7} {dtype:9} {kind:12} {row['name']:20}"
        if "error" in row:
            print(start, row["error"][:60])
        else:
            print(
                f"{start} {row['us']:9.2f} {row['floor_us']:8.2f} {row['us'] / row['floor_us']:6.2f}"
                f" {row['launches']:8} {row['back_to_back_us']:8.1f}"
            )


if __name__ == "__main__":
    main()
