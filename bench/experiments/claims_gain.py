"""Claims on the time of whole texts: where the sigmoid's gain comes from, and wall times."""

from claims_law import SIGMOID
from rows import MISSING, Table, change, grid, ref, span

PAPER_SIGMOID = 37, 94
"""Percent of time that the sigmoid saves in the paper's abstract."""

RELEASED = "sigmoid as released"


def gain(table: Table) -> list[str]:
    """Lines on where the sigmoid's gain comes from."""
    lines = []
    for num_draft in ("5", "heuristic"):
        for method, other in ((SIGMOID, "baseline"), (RELEASED, "baseline"), (SIGMOID, "ours")):
            for size in (8, 1, 4):
                new, old = (table.find("text", m, num_draft=num_draft, batch_size=size) for m in (method, other))
                if not (new and old):
                    wanted = size == 8 or (size == 1 and num_draft == "5" and method == SIGMOID)
                    if wanted and not table.fixture:
                        lines.append([f"{method} / {other}", num_draft, str(size), MISSING, MISSING, MISSING])
                    continue
                calls = new["calls"] / old["calls"]
                call = new["call_us"] / old["call_us"] if "call_us" in new and "call_us" in old else None
                lines.append([f"{method} / {other} {ref(new, old)}", num_draft, str(size), f"{calls:.2f}",
                              *([f"{call:.2f}", f"{calls * call:.2f}"] if call else 2 * [MISSING])])  # fmt: skip
    out = (
        grid(
            ["ratio", "drafts", "texts at a time", "calls per text", "time of a call of 5 drafts", "sampling per text"],
            lines,
        )
        if lines
        else []
    )
    base = table.find("text", "baseline")
    low, high = PAPER_SIGMOID
    for method in (RELEASED, SIGMOID):
        row = table.find("text", method)
        if base and row and "call_ms" in base and "call_ms" in row:
            saved = 100 * (1 - row["calls"] * row["call_us"] / base["calls"] / base["call_us"])
            where = "within" if low <= saved <= high else "below" if saved < low else "above"
            by = (
                "compiled by XLA as the baseline is" if method == RELEASED else "as a kernel, which the baseline is not"
            )
            out.append(f"- {method}, {by}: a text's sampling takes {saved:.0f} % less, {where} the {low} to {high} % "
                       f"of the abstract; calls alone are {change(row['calls'], base['calls'], 'fewer')} "
                       f"{ref(row, base)}. Not the same: {row['batch_size']} texts at a time where the paper has one, "
                       "and a fixed draft length.")  # fmt: skip
    if base and "share" in base:
        ours = table.find("text", "ours")
        less = f" Ours takes {100 * ours['share']:.1f} % {ref(ours)}." if ours and "share" in ours else ""
        out.append(f"- All of the baseline's sampling is {100 * base['share']:.1f} % of the wall time of its texts "
                   f"{ref(base)}: with these models no rule can save more than that by a faster "
                   f"call.{less}")  # fmt: skip
    return out + wall_times(table)


def wall_times(table: Table) -> list[str]:
    """Lines on wall times, of rows that were computed on one machine."""
    rows = {
        m: r for m in ("target alone", "ours", SIGMOID, "drafter alone", "calibrated") if (r := table.find("text", m))
    }
    out = []
    varied = {m: r for m, r in rows.items() if "ms_range" in r}
    if varied:
        said = ", ".join(f"{span(r['ms_range'], '.1f')} by {m}" for m, r in varied.items())
        out.append(f"- Wall time varies from run to run, in ms per text with other seeds: {said} "
                   f"{ref(*varied.values())}. Smaller differences of wall time in the rows mean nothing.")  # fmt: skip
    ours, alone = rows.get("ours"), rows.get("target alone")
    if table.fixture or not (ours and alone) or ours["machine"] != alone["machine"]:
        return out
    walls = {m: r for m, r in rows.items() if m != "calibrated" and r["machine"] == ours["machine"]}
    said = ", ".join(f"{m} {r['ms']:.1f}" for m, r in walls.items())
    once = "" if "ms_range" in ours else " These are single runs, whose noise is not known."
    kernels = "on" if table.kernels(ours) else "off"
    out.append(f"- Wall time in ms per text on one machine, kernels {kernels}: {said} {ref(*walls.values())}: ours "
               f"takes {change(ours['ms'], alone['ms'])} than the target alone.{once}")  # fmt: skip
    return out
