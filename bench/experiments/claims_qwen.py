"""The claims of the page on Qwen2.5-Coder with n-grams as its drafter, which summarises without training."""

from rows import MARGINS, Table, grid, ref, signed, verdict
from score import describe

ENOUGH = 400
"""Texts from which differences are read."""

QWEN = ("qwen",)
"""The task without a drafter that is a model, which answers one question."""


def zero_shot(table: Table) -> list[str]:
    """Lines on quality, drafts and equality with few texts."""
    trivial = table.all("trivial")[0]
    out = []
    alone = [
        (name, table.find("text", "target alone", temperature=t)) for name, t in (("greedy", 0.0), ("sampled", 1.0))
    ]
    said = "; ".join(f"{name} {row['quality'][0]:.1f} {ref(row)}" for name, row in alone if row)
    if said:
        best = max(row["quality"][0] for _, row in alone if row)
        better = "" if best > trivial["quality"][0] else " Without training it does not beat that system."
        out.append(f"- {table.measure} of the target alone: {said}. The trivial system has {trivial['quality'][0]:.1f} "
                   f"{ref(trivial)}.{better}")  # fmt: skip
    lines = []
    for row in table.all("text"):
        if row["method"] == "target alone":
            continue
        first = f"{row['acceptance'][0]:.2f}" if row["acceptance"] else ""
        same = f"{row['same']} of {row['texts']}" if "same" in row else ""
        difference = row.get("difference")
        kind = describe({**row, "drafter": "model"}) or "sampled"
        lines.append([f"{row['method']} {ref(row)}", row["drafter"], kind, str(row["texts"]), first,
                      f"{row['tokens_per_call']:.2f}", f"{row['quality'][0]:.1f}", same,
                      signed(difference) if difference else "", verdict(table, row) if difference else ""])  # fmt: skip
    if lines:
        head = ["method", "drafter", "", "texts", "first draft accepted", "tokens/call", table.measure, "same text"]
        out += grid([*head, "to target alone", f"margin {MARGINS[table.measure]}"], lines)
    tested = sum(table.about["groups"].values())
    if tested < ENOUGH:
        out.append(f"- {tested} texts are too few to tell small differences: they show acceptance, and the size of the "
                   "sigmoid's loss.")  # fmt: skip
    return out
