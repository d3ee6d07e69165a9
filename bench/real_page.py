"""The part of docs/real-checkpoints.md that comes from results/real_cpu.json; `compare_real.py` writes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timing
from gpu import results

PAGE = timing.ROOT / "docs" / "real-checkpoints.md"
MARKS = "<!-- written by bench/compare_real.py -->", "<!-- end of what it writes -->"


def page_lines(about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Markdown of the results: the commands with their output, speed, start and memory."""
    speed, start, result = [], [], []
    for row in rows:
        if "command" in row:
            lines = [*row["messages"], *row["output"].strip("\n").splitlines()]
            # Texts hold fences of three.
            result += ["````console", f"$ {row['command']}", *lines, "````", ""]
            if "over_weights" in row:
                result += [f"Its largest resident memory is {row['over_weights']:.2f} times the files of weights.", ""]
            continue
        label = f"{row['model']}, {row['dtype']}" + (f", drafts: {row['drafter']}" if row["drafter"] else "")
        cells = [label, row["system"], f"{row['tokens_per_second']:.1f}", f"{row['times_transformers']:.2f}"]
        cells += [f"{row['cpu_ms_per_token']:.0f}", f"{row['tokens_per_pass']:.2f}", f"{row['over_weights']:.2f}"]
        speed.append([*cells, f"{row['same_texts']:.0%}" if "same_texts" in row else ""])
        if "start_seconds" in row:
            cold = f"{row['first_start_seconds']:.1f}" if "first_start_seconds" in row else ""
            # A difference of two times that vary: not before the weights are there.
            ready = max(row["start_seconds"], row["load_seconds"])
            cells = [label, row["system"], f"{row['load_seconds']:.1f}", f"{ready:.1f}", cold]
            start.append([*cells, f"{row['load_over_weights']:.2f}"])
    header = ["checkpoint", "system", "tokens/s", "times transformers", "CPU ms per token", "tokens per pass"]
    header += ["peak over weights", "equal texts"]
    starts = ["checkpoint", "system", "loaded, s", "ready, s", "ready with an empty cache, s", "peak over weights"]
    memory = "This library's peaks were measured again on {}, by `bench/real_memory.py`."
    return [
        *timing.environment_lines(about),
        *(["", memory.format(about["memory"])] if "memory" in about else []),
        "",
        "## Commands",
        "",
        *result,
        "## Speed and memory",
        "",
        *results.table(header, speed, left=(0, 1)),
        "",
        "## Start",
        "",
        *results.table(starts, start, left=(0, 1)),
    ]


def write_page(file: Path) -> None:
    """Replaces the part of the page that comes from the results."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    content = "\n".join(page_lines(*results.read(file)))
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{content}\n\n{MARKS[1]}{after}")
