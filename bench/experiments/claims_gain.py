"""Claims on the time of whole texts: where the sigmoid's gain comes from, and wall times."""

from claims_law import SIGMOID
from rows import MISSING, Table, change, grid, ref, span
from settings import AS_DATA

PAPER_SIGMOID = 37, 94
"""Percent of time that the sigmoid saves in the paper's abstract."""

RELEASED = "sigmoid as released"

WIDTHS = "sigmoid 2e3", SIGMOID, "sigmoid 2e5"
"""Rules that accept nearly all, so that their texts take as many calls."""


def gain(table: Table) -> list[str]:
    """Lines on where the sigmoid's gain comes from."""
    lines = []
    for num_draft in ("5", "heuristic"):
        for method, other in ((SIGMOID, "baseline"), (RELEASED, "baseline"), (SIGMOID, "ours")):
            for size in (8, 1, 4):
                new, old = (table.find("text", m, num_draft=num_draft, batch_size=size) for m in (method, other))
                if not (new and old):
                    wanted = {"num_draft": num_draft, "batch_size": size}
                    if all(table.plans("text", m, **wanted) for m in (method, other)):
                        lines.append([f"{method} / {other}", num_draft, str(size), MISSING, MISSING, MISSING])
                    continue
                calls = new["calls"] / old["calls"]
                call = new["call_us"] / old["call_us"] if "call_us" in new and "call_us" in old else None
                lines.append([f"{method} / {other} {ref(new, old)}", num_draft, str(size), f"{calls:.2f}",
                              *([f"{call:.2f}", f"{calls * call:.2f}"] if call else 2 * [MISSING])])  # fmt: skip
    out = (
        grid(
            [
                "ratio",
                "drafts",
                "texts at a time",
                "calls per text",
                "time of a call of 5 drafts, parameters as numbers",
                "sampling per text, parameters as numbers",
            ],
            lines,
        )
        if lines
        else []
    )
    base = table.find("text", "baseline")
    low, high = PAPER_SIGMOID
    for method in (RELEASED, SIGMOID):
        row = table.find("text", method)
        if base and row and "call_us" in base and "call_us" in row:
            saved = 100 * (1 - row["calls"] * row["call_us"] / base["calls"] / base["call_us"])
            where = "within" if low <= saved <= high else "below" if saved < low else "above"
            by = (
                "compiled by XLA as the baseline is" if method == RELEASED else "as a kernel, which the baseline is not"
            )
            loops = [table.find("call", m + AS_DATA) for m in (method, "baseline")]
            loop = ""
            if loops[0] and loops[1]:
                compiled = " XLA compiles it there too." if method == SIGMOID else ""
                sampling = row["calls"] * loops[0]["us"], base["calls"] * loops[1]["us"]
                loop = (f" With parameters as data, as these texts had them, it takes {change(*sampling)} "
                        f"{ref(loops[0], loops[1])}.{compiled}")  # fmt: skip
            out.append(f"- {method}, {by}: with parameters that are numbers, a text's sampling takes {saved:.0f} % "
                       f"less, {where} the {low} to {high} % of the abstract; calls alone are "
                       f"{change(row['calls'], base['calls'], 'fewer')} {ref(row, base)}.{loop} Not the same: "
                       f"{row['batch_size']} texts at a time where the paper has one, "
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
    alike = [r for m in WIDTHS if (r := table.find("text", m)) and r["machine"] == ours["machine"]]
    times = [r["ms"] for r in alike]
    if once and times and max(times) / min(times) > max(ours["ms"] / alone["ms"], alone["ms"] / ours["ms"]):
        once = (f" These are single runs: {', '.join(r['method'] for r in alike)}, which make nearly the same calls, "
                f"took {span(times, '.1f')} {ref(*alike)}, so that this difference may be noise.")  # fmt: skip
    kernels = "on" if table.kernels(ours) else "off"
    out.append(f"- Wall time in ms per text on one machine, kernels {kernels}: {said} {ref(*walls.values())}: ours "
               f"takes {change(ours['ms'], alone['ms'])} than the target alone.{once}")  # fmt: skip
    return out
