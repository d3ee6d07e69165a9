"""Puts the parts of a measurement together: one json and one table.

python bench/gpu/table.py OUT.json OUT.md PART.json ...
"""

import json
import pathlib
import sys


def main():
    out, table, *parts = map(pathlib.Path, sys.argv[1:])
    found = [json.loads(part.read_text()) for part in parts if part.exists()]
    timed = [part for part in found if any("us" in row for row in part["rows"])]
    copy = max(part["copy"] for part in timed if "copy" in part)
    rows = sorted((row for part in timed for row in part["rows"]), key=lambda r: (r["point"][3], *r["point"][:3][::-1]))
    lines = [
        f"# The step on a GPU: {timed[0]['device']}, JAX {timed[0]['jax']}",
        "",
        f"A copy on this card moves {copy / 1e12:.2f} TB/s, read and written. us: how long a kernel of a call runs on",
        "the device (CUPTI), the median over inputs that rotate past the L2: the kernel's two launches overlap, which",
        "counts once, and gaps between launches are not in it. Floor: what must be read, at the speed of the copy.",
        "Acceptance is .8. No command buffers: they hide kernels from the profiler.",
        "",
        "    bench/gpu.sh",
        "",
        "| V | K | B | type | draft | what | us | GB/s | times floor | launches |",
        "|---:|---:|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        b, k, v, dtype, kind = row["point"]
        if "us" not in row:
            lines.append(f"| {v} | {k} | {b} | {dtype} | {kind} | {row['name']} | {row['error'][:60]} | | | |")
            continue
        speed = row["bytes"] / row["us"] / 1e3
        floor = 1e6 * row["bytes"] / copy
        cells = f"{row['us']:.1f} | {speed:.0f} | {row['us'] / floor:.2f} | {row['launches']}"
        lines.append(f"| {v} | {k} | {b} | {dtype} | {kind} | {row['name']} | {cells} |")
    for part in found:
        if part in timed or not part["rows"]:
            continue
        lines += ["", f"Back to back, by the host's clock, {part['xla_flags']}:", ""]
        lines += [f"- {row['point']} {row['name']}: {row['back_to_back_us']} us" for row in part["rows"]]
    table.write_text("\n".join(lines) + "\n")
    out.write_text(json.dumps({**timed[0], "copy": copy, "rows": rows}, indent=1))
    print("\n".join(lines[-60:]))


if __name__ == "__main__":
    main()
