"""Plots of the experiments: times of calls, differences of quality, and total variation."""

from pathlib import Path
from typing import Any

from rows import EXACT_METHODS, MARGINS, OWN, support_words

COLORS = {"exact": "#00796b", "sigmoid": "#d9730d", "calibrated": "#6a4fb3", "alone": "#6b7280"}


def color(method: str) -> str:
    """A color for each kind of method."""
    for kind in ("sigmoid", "calibrated", "alone"):
        if kind in method:
            return COLORS[kind]
    return COLORS["exact"]


QUESTIONS = {
    "calls": "Is one call faster?",
    "quality": "What does it cost in quality, at a fixed draft length, and at what acceptance?",
    "laws": "What does it emit: the target's law, or the drafter's?",
}
"""The claim that each plot stands under."""

KERNELS = "ours", "block", "sigmoid 2e3", "sigmoid 2e4", "sigmoid 2e5"
"""The methods that have a GPU kernel here; XLA compiles the others."""

HEIGHTS = {"calls": 4.6, "quality": 3.8, "laws": 4.6}


def names(table: Any) -> dict[str, str]:
    """The plots of a table by file name, with their titles."""
    found = {
        "calls": "Device time of one sampling call",
        "quality": "Difference to the target alone",
        "laws": "Emitted law",
    }
    kinds = {"calls": "call", "quality": "text", "laws": "law"}
    return {f"experiments_{table.name}_{name}": title for name, title in found.items() if table.all(kinds[name])}


def draw(table: Any, folder: Path) -> None:
    """Writes the plots of a table as SVG."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "svg.fonttype": "none",
    }
    with plt.rc_context({**style, "svg.hashsalt": "specsamp", "font.family": "sans-serif"}):
        for name, title in names(table).items():
            kind = name.rpartition("_")[2]
            figure = plt.figure(figsize=(6.8, HEIGHTS[kind]))
            {"calls": _calls, "quality": _quality, "laws": _laws}[kind](figure, table)
            figure.axes[0].set_title(f"{title}: {table.about['models']}", fontsize=10, loc="left")
            figure.savefig(folder / f"{name}.svg", bbox_inches="tight", pad_inches=0.15, metadata={"Date": None})
            plt.close(figure)


def _calls(figure: Any, table: Any) -> None:
    axes = figure.subplots()
    rows = {size: dict(table.methods("call", batch_size=size)) for size in (1, 4, 8)}
    rows = {size: found for size, found in rows.items() if found}
    methods = list(dict.fromkeys(method for found in rows.values() for method in found))
    kernels = any(table.kernels(row) for row in table.all("call"))
    labels = [f"{method} (kernel)" if kernels and method in KERNELS else method for method in methods]
    height = 0.8 / max(len(rows), 1)
    for i, (size, found) in enumerate(rows.items()):
        shown = [method for method in methods if method in found]
        at = [methods.index(method) + height * i for method in shown]
        bars = [found[method]["us"] for method in shown]
        shade = 1 if i == len(rows) - 1 else 0.5
        axes.barh(at, bars, height, color=[color(method) for method in shown], alpha=shade)
        for y, value in zip(at, bars, strict=True):
            axes.text(value, y, f" {value:.0f} us, {size} text{'s' * (size > 1)}", va="center", fontsize=7)
    axes.set_yticks([i + height * (len(rows) - 1) / 2 for i in range(len(methods))], labels)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")


def _quality(figure: Any, table: Any) -> None:
    axes = figure.subplots()
    found = [(method, row) for method, row in table.methods("text") if "difference" in row]
    margin = MARGINS[table.measure]
    axes.axvspan(-margin, margin, color="#d5dbe1", lw=0)
    for y, (method, row) in enumerate(found):
        value, low, high = row["difference"]
        axes.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=4, capsize=2, color=color(method))
        drafts = f"{row['tokens_per_call']:.1f} tokens/call" if row["acceptance"] else ""
        axes.text(1.01, y, drafts, transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [method for method, _ in found])
    axes.invert_yaxis()
    better = "right" if table.measure == "ROUGE-L" else "left"
    axes.set_xlabel(f"{table.measure}, points; {better} is better; grey: the margin named beforehand")


BARS = {
    "to_target": ("first token, to the target's law", COLORS["exact"]),
    "to_draft": ("first token, to the drafter's law", COLORS["sigmoid"]),
    "bonus_to_target": ("token after full acceptance, to the target's law", COLORS["alone"]),
}


def _laws(figure: Any, table: Any) -> None:
    """One panel over the full support, and one with the checkpoint's own parameters if they were measured."""
    supports = [support for support in ({}, OWN) if table.find("law", "ours", **support)] or [{}]
    found = {m: row for m, row in table.methods("law") if m not in EXACT_METHODS or m == "ours"}
    panels = figure.subplots(1, len(supports), sharey=True, squeeze=False)[0]
    for axes, support in zip(panels, supports, strict=True):
        rows = {y: row for y, m in enumerate(found) if (row := table.find("law", m, **support))}
        for i, (key, (label, shade)) in enumerate(BARS.items()):
            at, bars = [y + 0.27 * i for y in rows], [row[key] for row in rows.values()]
            axes.barh(at, bars, 0.25, color=shade, label=label)
        words = f"\n{support_words(support) if support else 'full support'}" if len(supports) > 1 else ""
        axes.set(xlabel=f"total variation{words}", xlim=(0, 1))
    labels = ["exact rules" if method == "ours" else method for method in found]
    panels[0].set_yticks([y + 0.27 for y in range(len(found))], labels)
    panels[0].invert_yaxis()
    # Under the label, which has a second line where there are panels.
    corner = (0.45, -0.14) if len(supports) == 1 else (1, -0.2)
    panels[0].legend(frameon=False, loc="upper center", bbox_to_anchor=corner, fontsize=8)
