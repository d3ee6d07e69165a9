"""The tables of a task as the page reads them: rows by method and settings, their labels, and numbers in words."""

import json
from pathlib import Path
from typing import Any

from score import DEFAULTS, describe
from settings import AS_DATA, QWEN_OWN, Setting, expand, plan

MARGINS = {"ROUGE-L": 1.0, "WER": 0.5}
"""Differences to the target alone, in points, that count as none. Named before anything was run."""

EXACT_METHODS = "baseline", "exact", "ours", "block", "coupled"
ORDER = (
    *("target alone", "drafter alone", *EXACT_METHODS, "sigmoid 2e3", "sigmoid 2e4", "sigmoid 2e5"),
    *("sigmoid as released", "calibrated", "calibrated +4", "calibrated unreported", "calibrated exact"),
)
"""The methods in the order of plots and tables."""

TITLES = {
    "asr": "Recognition",
    "summarization": "Summarisation",
    "pair": "Summarisation by Qwen",
    "qwen": "Qwen, n-grams",
}
"""The tasks in the order of the page."""

OWN = {name: value for name, (value,) in QWEN_OWN.items()}
"""The sampling parameters of a checkpoint that is not greedy."""

SUPPORTS: list[dict[str, Any]] = [{}, {"top_k": 50}, OWN]
"""The sampling parameters at which quality and laws are compared."""

MISSING = "not measured yet"
Row = dict[str, Any]


class Table:
    """The rows of a task, numbered by kind."""

    def __init__(self, path: Path):
        contents = json.loads(path.read_text())
        self.name, self.about = path.stem, contents["about"]
        self.title = TITLES[self.name]
        planned = plan(self.name)
        kinds = {"text": planned.runs, "call": planned.calls, "law": planned.laws}
        self.planned = {kind: set(expand(blocks)) for kind, blocks in kinds.items()}
        self.rows: list[Row] = [{**DEFAULTS, **row} for row in contents["rows"]]
        self.measure = {"rouge": "ROUGE-L", "wer": "WER"}[self.about["metric"]]
        self.fixture = "fixture" in self.about["models"]
        counts: dict[str, int] = {}
        for row in self.rows:
            counts[row["kind"]] = counts.get(row["kind"], 0) + 1
            row["id"] = f"{self.name}-{row['kind']}-{counts[row['kind']]}"
        for row in self.all("text"):
            self._derive(row)

    def _derive(self, row: Row) -> None:
        """Adds what follows from a row of texts and from the time of its call: of one with 5 drafts by a model."""
        row["tokens_per_call"] = row["tokens"] / row["calls"]
        settings = {key: row[key] for key in ("temperature", "top_k", "top_p", "dtype", "batch_size")}
        call = self.find("call", row["method"], **settings)
        if call:
            row["call_us"] = call["us"]
        loop = self.find("call", row["method"] + AS_DATA, **settings) or call
        if loop:
            row["loop_us"] = loop["us"]
        # The time of a text's calls, and its share of wall time, need calls and texts that ran the same program.
        if loop and self.same_program(row, loop):
            row["call_ms"] = row["batch_calls"] * loop["us"] / 1e3 / row["texts"]
            if (row["drafter"], row["num_draft"]) == ("model", "5"):
                row["share"] = row["call_ms"] / row["ms"]

    def kernels(self, row: Row) -> bool:
        """Whether a row was computed with this package's GPU kernels."""
        return dict(enumerate(self.about["machines"])).get(row["machine"], {}).get("kernels") == "on"

    def same_program(self, row: Row, call: Row) -> bool:
        """Whether a timed call is the program that a row's texts ran.

        Both must have run with kernels, and the call with parameters that are data; or the rule has no kernel.
        """
        plain = row["method"] in ("baseline", "exact", "sigmoid as released") and not row["top_k"] and row["top_p"] == 1
        on = [self.kernels(each) for each in (row, call)]
        return plain or (on[0] == on[1] and call["method"].endswith(AS_DATA))

    def find(self, kind: str, method: str, **settings: Any) -> Row | None:
        """The row of a method with these settings and the defaults of the others, at any batch size for laws."""
        wanted = {**DEFAULTS, **settings, "kind": kind, "method": method}
        keys = "kind", "method", "drafter", "temperature", "top_k", "top_p", "dtype", "batch_size", "num_draft"
        found = [row for row in self.rows if "error" not in row and all(row.get(key) == wanted[key] for key in keys)]
        if not found and self.fixture and "batch_size" not in settings:
            return self.find(kind, method, **settings, batch_size=4)
        return found[0] if found else None

    def plans(self, kind: str, method: str, **settings: Any) -> bool:
        """Whether a row of this kind with these settings is to be measured; in a run on fixtures none is missed."""
        return not self.fixture and Setting(method)._replace(**settings) in self.planned[kind]

    def all(self, kind: str) -> list[Row]:
        """All rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def methods(self, kind: str, **settings: Any) -> list[tuple[str, Row]]:
        """The methods that have a row of this kind with these settings, in the order of the page."""
        names = [*ORDER, *(row["method"] for row in self.all(kind) if not row["method"].endswith(AS_DATA))]
        return [(name, row) for name in dict.fromkeys(names) if (row := self.find(kind, name, **settings))]


def support_words(support: dict[str, Any]) -> str:
    """Sampling parameters of `SUPPORTS` in words."""
    return describe({**DEFAULTS, **support}) or "full"


def short(name: str) -> str:
    """The label of a row: S or A for the task, T, C or L for texts, calls or laws, and its number."""
    task, kind, number = name.split("-")
    return task[0].upper() + ("0" if kind == "trivial" else kind[0].upper() + number)


def ref(*rows: Row) -> str:
    """Links to rows."""
    links = (f"[{short(row['id'])}](#{row['id']})" for row in rows)
    return f"({', '.join(links)})"


def cell(row: Row | None, text: str) -> str:
    """A number that links to its row."""
    return f"[{text}](#{row['id']})" if row else MISSING


def line(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def grid(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table, with an empty line before and after it."""
    return ["", line(head), line(["---"] * len(head)), *map(line, lines), ""]


def signed(values: list[float]) -> str:
    """A difference with its interval, in a table."""
    value, low, high = values
    return f"{value:+.2f} ({low:+.2f}, {high:+.2f})"


def points(values: list[float]) -> str:
    """A difference with its interval, in a sentence."""
    value, low, high = values
    return f"{value:+.2f} points ({low:+.2f} to {high:+.2f})"


def change(new: float, old: float, less: str = "less") -> str:
    """A relative change in words."""
    percent = 100 * (new / old - 1)
    return f"{abs(percent):.0f} % {less if percent < 0 else 'more'}"


def span(values: list[float], form: str = ".0f") -> str:
    """The smallest and the largest of some numbers."""
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"


def verdict(table: Table, row: Row) -> str:
    """The result of the equivalence test, with the margin named beforehand."""
    _, low, high = row["difference"]
    margin = MARGINS[table.measure]
    if -margin <= low and high <= margin:
        return "equal within the margin"
    if low <= 0 <= high:
        return "not decided"
    word = "worse" if loses(table, row["difference"]) else "better"
    return (
        f"{word} by more than the margin" if min(abs(low), abs(high)) > margin else f"{word}, perhaps within the margin"
    )


def excludes_loss(table: Table, row: Row) -> bool:
    """Whether an interval leaves no room for a loss of more than the margin, whatever it says of a gain."""
    _, low, high = row["difference"]
    return (-low if table.measure == "ROUGE-L" else high) <= MARGINS[table.measure]


def loses(table: Table, difference: list[float]) -> bool:
    """Whether an interval lies on the side of worse quality: a higher ROUGE is better, a lower word error rate."""
    _, low, high = difference
    return high < 0 if table.measure == "ROUGE-L" else low > 0


def days(table: Table, calls: list[Row]) -> str:
    """Sentences on calls that were timed on different days, with the kernels of those days, and on their texts."""

    def date(row: Row) -> str:
        return table.about["machines"][row["machine"]]["date"]

    every = sorted({date(row) for row in calls})
    if len(every) == 1:
        return ""
    methods = dict.fromkeys(row["method"] for row in calls if date(row) == every[-1])
    words = " and ".join(methods)
    said = f" Those of {words} were timed on {every[-1]}, after changes of the kernels, the others on {every[0]}."
    if any((row := table.find("text", method)) and date(row) != every[-1] for method in methods):
        said += f" The texts of {words} ran before these changes, so that their shares of wall time are of both days."
    return said
