"""Joins the partial results of `timings.py` into one JSON file and one Markdown table of the shapes in bfloat16 at K 4.

python bench/gpu/table.py OUT.json OUT.md PART.json ...
"""

import pathlib
import sys

import results

COLUMNS = "B", "K", "V", "dtype", "draft", "us and launches by name"
"""Fields of a row of the json."""

ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

ACCEPTANCE = 0.8

NAMES = "kernel", "xla", "paper's baseline", "paper's exact", "sigmoid kernel", "sigmoid xla"
"""Columns of the table; other kernels and blocks per sequence have a table of their own."""


ABOUT = """# The step on a GPU: {device}, JAX {jax}

A copy on this card moves {copy:.2f} TB/s, read and written. A time is how many microseconds of a call at least one
of its kernels runs (CUPTI), the median over inputs that rotate past the L2: launches that overlap count once, gaps
between launches not at all. In parentheses is the number of launches. The floor is what must be read, at the speed of
the copy; "times floor" is the kernel's. Acceptance is .8. Command buffers are off: they hide kernels from the profiler.

    bench/gpu.sh

In bfloat16 at K 4. The JSON file beside this page has float32 and K 8 too.
"""


def floor_bytes(batch_size, num_draft, vocab_size, dtype, kind, name="kernel"):
    """Least number of bytes to read.

    Without normalizers: all rows. With normalizers: the target's rows, and one pair of rows after a rejection. Sigmoid
    rule: one row, because a wide sigmoid accepts nearly every draft.
    """
    rows = 2 * num_draft + 1 if kind == "logits" else num_draft + 1 + 2 * (1 - ACCEPTANCE**num_draft)
    rows = 1 if name.startswith("sigmoid") else rows
    return batch_size * rows * vocab_size * ITEM_SIZES[dtype]


def tables(about, rows):
    """The lines of the page."""
    by_point = {tuple(point): found for *point, found in rows}
    yield ABOUT.format(copy=about["copy"] / 1e12, **{name: about[name] for name in ("device", "jax")})
    lines = []
    for point, found in by_point.items():
        b, k, v, dtype, kind = point
        if (k, dtype) != (4, "bfloat16"):
            continue
        cells = [f"{found[n][0]:.1f} ({found[n][1]})" if n in found else "" for n in NAMES]
        floor = 1e6 * floor_bytes(*point) / about["copy"]
        times = f"{found['kernel'][0] / floor:.2f}" if "kernel" in found else ""
        lines.append([v, b, kind, f"{floor:.1f}", times, *cells])
    yield from results.table(["V", "B", "draft", "floor", "times floor", *NAMES], lines, left=())
    yield ""
    yield "Other kernels and blocks per sequence:"
    yield ""
    others = [[*point, n, f"{found[n][0]:.1f}"] for point, found in by_point.items() for n in found if n not in NAMES]
    yield from results.table(["B", "K", "V", "dtype", "draft", "kernel", "us"], others, left=())
    for flags, host in about["host"].items():
        yield ""
        yield f"Back to back, by the host's clock, {flags}:"
        yield ""
        yield from (f"- {point} {name}: {us} us" for *point, found in host for name, (us,) in found.items())


def main():
    out, page, *parts = map(pathlib.Path, sys.argv[1:])
    found = [results.read(part) for part in parts if part.exists()]
    timed = [(about, rows) for about, rows in found if "copy" in about]
    host = {a["xla_flags"]: rows for a, rows in found if "copy" not in a and rows}
    about = timed[0][0] | {"copy": max(a["copy"] for a, _ in timed), "columns": COLUMNS, "host": host}
    rows = sorted((row for _, rows in timed for row in rows), key=lambda row: (row[3], *row[:3][::-1]))
    results.write(out, about, rows)
    lines = list(tables(about, rows))
    page.write_text("\n".join(lines) + "\n")
    print("\n".join(lines[-60:]))


if __name__ == "__main__":
    main()
