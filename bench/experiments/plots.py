"""Plots of the experiments: times, quality against speed, and total variation."""

from pathlib import Path
from typing import Any

COLORS = {"exact": "#00796b", "sigmoid": "#d9730d", "calibrated": "#6a4fb3", "alone": "#6b7280"}


def color(method: str) -> str:
    """A color for each kind of method."""
    for kind in ("sigmoid", "calibrated", "alone"):
        if kind in method:
            return COLORS[kind]
    return COLORS["exact"]


def names(table: Any) -> dict[str, str]:
    """The plots of a table by file name, with their titles."""
    found = {"calls": "Time of one sampling call", "quality": "Quality and tokens per call", "laws": "Emitted law"}
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
            figure, axes = plt.subplots(figsize=(6.8, 3.6))
            kind = name.rpartition("_")[2]
            {"calls": _calls, "quality": _quality, "laws": _laws}[kind](axes, table)
            axes.set_title(f"{title}: {table.about['models']}", fontsize=10, loc="left")
            figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)


def _calls(axes: Any, table: Any) -> None:
    rows = {size: dict(table.methods("call", batch_size=size)) for size in (1, 4, 8)}
    rows = {size: found for size, found in rows.items() if found}
    methods = list(dict.fromkeys(method for found in rows.values() for method in found))
    height = 0.8 / max(len(rows), 1)
    for i, (size, found) in enumerate(rows.items()):
        at = [j + height * i for j, method in enumerate(methods) if method in found]
        shown = [method for method in methods if method in found]
        bars = [found[method]["us"] for method in shown]
        axes.barh(
            at, bars, height, color=[color(method) for method in shown], alpha=0.5 + 0.5 * i, label=f"{size} texts"
        )
        for y, value in zip(at, bars, strict=True):
            axes.text(value, y, f" {value:.0f} us, batch {size}", va="center", fontsize=8)
    axes.set_yticks(range(len(methods)), methods)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")


def _quality(axes: Any, table: Any) -> None:
    for method, row in table.methods("text"):
        axes.plot(row["tokens_per_call"], row["quality"][0], "o", color=color(method))
        axes.annotate(
            method, (row["tokens_per_call"], row["quality"][0]), (4, 3), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="tokens per call", ylabel=f"{table.measure}, sampled, 5 drafts")


def _laws(axes: Any, table: Any) -> None:
    found = table.methods("law")
    for shift, key, label in ((0, "to_target", "to the target's law"), (0.4, "to_draft", "to the drafter's law")):
        at = [i + shift for i in range(len(found))]
        shade = COLORS["exact"] if key == "to_target" else COLORS["sigmoid"]
        axes.barh(at, [row[key] for _, row in found], 0.38, color=shade, label=label)
    axes.set_yticks([i + 0.2 for i in range(len(found))], [method for method, _ in found])
    axes.invert_yaxis()
    axes.legend(frameon=False)
    axes.set_xlabel("total variation of the first emitted token")
