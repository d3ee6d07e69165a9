"""Writes the page of the experiments from their tables: REPORT.md here, docs/experiments.md, and the plots.

    python bench/experiments/report.py [--tables FOLDER] [--out FOLDER]

No number of the page is typed: sentences take theirs from rows, and point at them.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import caches
import plots
from score import DEFAULTS

ROOT = Path(__file__).parents[2]
MARGINS = {"ROUGE-L": 1.0, "WER": 0.5}
"""Differences to the target alone, in points, that count as none. Named before anything was run."""

PAPER_EXACT, PAPER_SIGMOID = (6, 13), (37, 94)
"""Percent of time saved in the paper's abstract: the only numbers that are taken from it."""

EXACT_METHODS = "baseline", "exact", "ours", "block"
Row = dict[str, Any]


class Table:
    """The rows of a task, numbered by kind."""

    def __init__(self, path: Path):
        contents = json.loads(path.read_text())
        self.name, self.about = path.stem, contents["about"]
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
        settings = {key: row[key] for key in ("temperature", "top_k", "dtype", "batch_size")}
        call = self.find("call", row["method"], **settings)
        if call:
            row["call_us"], row["call_ms"] = call["us"], row["batch_calls"] * call["us"] / 1e3 / row["texts"]
            row["share"] = row["call_ms"] / row["ms"]

    def find(self, kind: str, method: str, **settings: Any) -> Row | None:
        """The row of a method with these settings and the defaults of the others, at any batch size for laws."""
        wanted = {**DEFAULTS, **settings, "kind": kind, "method": method}
        keys = "kind", "method", "drafter", "temperature", "top_k", "dtype", "batch_size", "num_draft"
        found = [row for row in self.rows if "error" not in row and all(row.get(key) == wanted[key] for key in keys)]
        if not found and self.fixture and "batch_size" not in settings:
            return self.find(kind, method, **settings, batch_size=4)
        return found[0] if found else None

    def all(self, kind: str) -> list[Row]:
        """All rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def methods(self, kind: str, **settings: Any) -> list[tuple[str, Row]]:
        """The methods that have a row of this kind with these settings."""
        names = dict.fromkeys(row["method"] for row in self.all(kind))
        return [(name, row) for name in names if (row := self.find(kind, name, **settings))]


def ref(*rows: Row) -> str:
    """Links to rows."""
    links = (f"[{short(row['id'])}](#{row['id']})" for row in rows)
    return f"({', '.join(links)})"


def short(name: str) -> str:
    """The label of a row: S or A for the task, T, C or L for texts, calls or laws, and its number."""
    task, kind, number = name.split("-")
    return task[0].upper() + ("0" if kind == "trivial" else kind[0].upper() + number)


def points(values: list[float]) -> str:
    """A difference with its interval."""
    value, low, high = values
    return f"{value:+.2f} points ({low:+.2f} to {high:+.2f})"


def verdict(table: Table, row: Row) -> str:
    """The result of the equivalence test."""
    _, low, high = row["difference"]
    margin = MARGINS[table.measure]
    if -margin <= low and high <= margin:
        return f"equal within the margin of {margin} points"
    if low <= 0 <= high:
        return f"not decided: the interval holds 0 and is wider than the margin of {margin} points"
    # A higher ROUGE is better, a lower word error rate.
    sign = 1 if table.measure == "ROUGE-L" else -1
    word = "better" if sign * low > 0 else "worse"
    beyond = min(abs(low), abs(high)) > margin
    return (
        f"{word} by more than the margin of {margin} points"
        if beyond
        else f"{word}, around the margin of {margin} points"
    )


def change(new: float, old: float, less: str = "less") -> str:
    """A relative change in words."""
    percent = 100 * (new / old - 1)
    return f"{abs(percent):.0f} % {less if percent < 0 else 'more'}"


def first(row: Row) -> str:
    """Acceptance at the first position."""
    return f"{row['acceptance'][0]:.2f}" if row["acceptance"] else "none"


def exactness(table: Table) -> list[str]:
    """Sentences on whether exact rules lose anything."""
    out = []
    for method in EXACT_METHODS:
        greedy, sampled = (table.find("text", method, temperature=t) for t in (0.0, 1.0))
        if greedy and "same" in greedy:
            out.append(f"Greedy, {method} wrote {greedy['same']} of {greedy['texts']} texts as the target alone does; "
                       f"difference {points(greedy['difference'])} {ref(greedy)}.")  # fmt: skip
        if sampled and "difference" in sampled:
            out.append(f"Sampled (seeds: {sampled['seeds']}), {method} differs from the target alone by "
                       f"{points(sampled['difference'])}: {verdict(table, sampled)} {ref(sampled)}.")  # fmt: skip
    return out


def one_call(table: Table) -> list[str]:
    """Sentences on the time of one call."""
    out = []
    for batch_size in (1, 8):
        for settings in ({}, {"dtype": "bfloat16"}, {"top_k": 50}, {"temperature": 0.0}):
            rows = dict(table.methods("call", batch_size=batch_size, **settings))
            if "baseline" not in rows:
                continue
            base, words = rows["baseline"], [f"{key} {value}" for key, value in settings.items()]
            where = ", ".join([f"{batch_size} text{'s' * (batch_size > 1)} at a time", *words]).replace("_", "-")
            for method in ("exact", "ours", "sigmoid 2e4"):
                if method in rows:
                    row = rows[method]
                    out.append(f"{where}: one call of {method} takes {row['us']:.4g} us, {change(row['us'], base['us'])} "
                               f"than the {base['us']:.4g} us of the baseline {ref(row, base)}.")  # fmt: skip
    base, exact = (table.find("call", method, batch_size=1) for method in ("baseline", "exact"))
    if base and exact:
        saved = 100 * (1 - exact["us"] / base["us"])
        low, high = PAPER_EXACT
        where = "within" if low <= saved <= high else "below" if saved < low else "above"
        out.append(f"The paper's abstract has {low} to {high} % for its exact method, against its baseline. Here the same "
                   f"formulation, left to the compiler, saves {saved:.0f} %, {where} that range {ref(exact, base)}. Not the "
                   "same: their kernel is CUDA under PyTorch, and this baseline writes the residuals of all "
                   "rows.")  # fmt: skip
    return out


def gain(table: Table) -> list[str]:
    """Sentences on where the sigmoid's gain comes from."""
    out = []
    for num_draft, words in (
        ("5", "with 5 drafts"),
        ("heuristic", "with the paper's heuristic (times are those of a call with 5 drafts)"),
    ):
        base, ours, sigmoid = (table.find("text", m, num_draft=num_draft) for m in ("baseline", "ours", "sigmoid 2e4"))
        for name, other in (("the baseline", base), ("ours", ours)):
            if not (other and sigmoid and "call_ms" in other and "call_ms" in sigmoid):
                continue
            calls, call = sigmoid["calls"] / other["calls"], sigmoid["call_us"] / other["call_us"]
            total = calls * call
            share = math.log(calls) / math.log(total) if abs(math.log(total)) > 1e-3 else math.nan
            out.append(f"{words.capitalize()}, the sigmoid at 2e4 makes {change(sigmoid['calls'], other['calls'], 'fewer')} calls per "
                       f"text than {name}, and one call takes {change(sigmoid['call_us'], other['call_us'])}; a text's "
                       f"sampling takes {change(total, 1)}, of which fewer calls explain {100 * share:.0f} % (of the "
                       f"logarithm) {ref(sigmoid, other)}.")  # fmt: skip
    base, sigmoid = table.find("text", "baseline", batch_size=1), table.find("text", "sigmoid 2e4", batch_size=1)
    if base and sigmoid and "call_ms" in base and "call_ms" in sigmoid:
        saved = 100 * (1 - sigmoid["call_ms"] / base["call_ms"])
        low, high = PAPER_SIGMOID
        where = "within" if low <= saved <= high else "below" if saved < low else "above"
        out.append(f"The paper's abstract has {low} to {high} % for its sigmoid, models excluded. Here, one text at a time, "
                   f"a text's sampling takes {saved:.0f} % less than by the baseline, {where} that range "
                   f"{ref(sigmoid, base)}.")  # fmt: skip
    base, sigmoid = table.find("text", "baseline"), table.find("text", "sigmoid 2e4")
    if base and sigmoid and "share" in base:
        out.append(f"Sampling is {100 * base['share']:.1f} % of the wall time of the baseline, and "
                   f"{100 * sigmoid.get('share', math.nan):.1f} % of the sigmoid's {ref(base, sigmoid)}.")  # fmt: skip
    return out


def cost(table: Table) -> list[str]:
    """Sentences on what the sigmoid costs."""
    out = []
    for top_k in (0, 50):
        support = f"top-k {top_k}" if top_k else "full support"
        for method, row in table.methods("text", top_k=top_k):
            if not method.startswith(("sigmoid", "calibrated")) or "difference" not in row:
                continue
            out.append(f"{support}, 5 drafts: {method} accepts {first(row)} of first drafts and emits "
                       f"{row['tokens_per_call']:.2f} tokens per call; {table.measure} {points(row['difference'])} against "
                       f"the target alone: {verdict(table, row)} {ref(row)}.")  # fmt: skip
    for method in ("target alone", "ours", "sigmoid 2e4", "sigmoid as released", "calibrated", "drafter alone"):
        row = table.find("text", method)
        if row and "groups" in row:
            rates = ", ".join(f"{group} {value:.1f}" for group, value in row["groups"].items())
            out.append(f"{table.measure} of {method} by test set: {rates} {ref(row)}.")
    drafter, target = (table.find("text", method) for method in ("drafter alone", "target alone"))
    if drafter and target and "difference" in drafter:
        out.append(f"The drafter alone is at {points(drafter['difference'])} {ref(drafter, target)}.")
    return out


def emitted(table: Table) -> list[str]:
    """Sentences on the law that each rule emits."""
    out = []
    for top_k in (0, 50):
        support = f"top-k {top_k}" if top_k else "full support"
        for method, row in table.methods("law", top_k=top_k):
            if method in EXACT_METHODS and method != "ours":
                continue
            near = "the target's law" if row["to_target"] < row["to_draft"] else "the drafter's law"
            out.append(f"{support}: the first token of {method} is at a total variation of {row['to_target']:.2g} from the "
                       f"target's law and {row['to_draft']:.2g} from the drafter's, so it follows {near}; the token after "
                       f"full acceptance is at {row['bonus_to_target']:.2g} from the target's {ref(row)}.")  # fmt: skip
    return out


def widths(table: Table) -> list[str]:
    """Sentences on alpha and beta."""
    rows = [(m, r) for m, r in table.methods("law") if m.startswith("sigmoid 2")]
    if not rows:
        return []
    low, high = (pick(row["acceptance"] for _, row in rows) for pick in (min, max))
    listed = [row for _, row in rows]
    out = [f"At beta - alpha of {', '.join(m.split()[1] for m, _ in rows)} the first draft is accepted with probability "
           f"{low:.4f} to {high:.4f}, where 1 - TV(p, q) is {1 - listed[0]['between']:.2f} {ref(*listed)}."]  # fmt: skip
    exact = table.find("law", "calibrated exact")
    if exact:
        out.append(f"With beta - alpha = 1 and alpha = 10 above each row's own log-normaliser the total variation to the "
                   f"target is {exact['to_target']:.1g} {ref(exact)}: the only choice here that means anything, and it needs "
                   "the sum that the sigmoid was to avoid.")  # fmt: skip
    return out


def calibrated(table: Table) -> list[str]:
    """Sentences on the calibrated sigmoid."""
    out = []
    for method, row in table.methods("text"):
        if method.startswith("calibrated") and "bound" in row:
            mean, largest, error = row["bound"]
            out.append(f"{method}: drafts decided by an estimate had a bound on the total variation of {mean:.2g} on average "
                       f"and at most {largest:.2g}; the estimate was off by {error:.2g} nats on average. It accepts "
                       f"{first(row)} of first drafts {ref(row)}.")  # fmt: skip
        law = table.find("law", method)
        if method.startswith("calibrated") and law:
            out.append(f"{method}: the law of the first token is at {law['to_target']:.2g} from the target's, with the "
                       f"estimate that earlier rows of the text give {ref(law)}.")  # fmt: skip
    return out


CLAIMS = [
    ("Does the exact method lose nothing?", exactness),
    ("Is one call faster?", one_call),
    ("Where does the sigmoid's gain come from: fewer calls, or a faster call?", gain),
    ("What does it cost in quality, at a fixed draft length, and at what acceptance?", cost),
    ("What does it emit: the target's law, or the drafter's?", emitted),
    ("Which alpha and beta mean anything?", widths),
    ("What does the calibrated sigmoid keep?", calibrated),
]


def describe(row: Row) -> str:
    """The settings of a row that are not the defaults."""
    parts = [
        row["drafter"] if row["drafter"] != "model" else "",
        "greedy" if row["temperature"] == 0 else "",
        f"top-k {row['top_k']}" if row["top_k"] else "",
        row["dtype"] if row["dtype"] != "float32" else "",
        f"batch {row['batch_size']}" if row["batch_size"] != 8 else "",
        row["num_draft"] if row["num_draft"] != "5" else "",
        f"{row['seeds']} seeds" if row["seeds"] != 1 else "",
        f"machine {row['machine'] + 1}" if row["machine"] else "",
    ]
    return ", ".join(part for part in parts if part)


def number(row: Row, key: str, form: str = ".4g") -> str:
    """A cell."""
    return format(row[key], form) if row.get(key) is not None else ""


def tables(table: Table) -> list[str]:
    """All rows in three tables."""
    scale = [table.measure] + (["ROUGE-1", "ROUGE-2"] if table.measure == "ROUGE-L" else [])
    head = ["row", "method", "settings", "texts", *scale, "to target alone", "acceptance by position", "tokens/call"]
    head += ["calls/text", "us/call", "ms of calls/text", "share", "ms/text", "same", "empty"]
    lines = ["Texts. Settings that are not named: a model drafts, temperature 1, full support, float32 logits, 8 texts at a "
             "time, 5 drafts, one seed. `ms/text` is the host's clock over a batch, divided by its texts.", ""]  # fmt: skip
    lines += [line(head), line(["---"] * len(head))]
    for row in [*table.all("text"), *table.all("trivial")]:
        accepted = " ".join(f"{x:.2f}" for x in row.get("acceptance", []))
        difference = "{:+.2f} ({:+.2f}, {:+.2f})".format(*row["difference"]) if "difference" in row else ""
        share = f"{100 * row['share']:.1f} %" if "share" in row else ""
        cells = [anchor(row), row["method"], describe(row) if row["kind"] == "text" else "", str(row["texts"])]
        cells += [f"{value:.2f}" for value in row["quality"]] + [difference, accepted]
        cells += [number(row, key) for key in ("tokens_per_call", "calls", "call_us", "call_ms")] + [share]
        cells += [number(row, key) for key in ("ms", "same", "empty")]
        lines.append(line(cells))
    head = ["row", "method", "settings", "us", "launches", "MB", "of these temporary"]
    lines += ["", "One sampling call of 5 drafts, from the key, on logits of real texts; device time by the profiler on a "
              "GPU, the host's clock elsewhere. Memory as the compiler counts it: arguments, results and temporaries.",
              "", line(head), line(["---"] * len(head))]  # fmt: skip
    for row in table.all("call"):
        if "error" in row:
            lines.append(line([anchor(row), row["method"], describe(row), row["error"].split(":")[0], "", "", ""]))
            continue
        sizes = [f"{row[key] / 1e6:.2f}" for key in ("bytes", "temporary_bytes")]
        lines.append(
            line([anchor(row), row["method"], describe(row), number(row, "us"), number(row, "launches"), *sizes])
        )
    head = [
        "row",
        "method",
        "settings",
        "to target",
        "to drafter",
        "bonus to target",
        "acceptance",
        "TV(p, q)",
        "contexts",
    ]
    lines += ["", "Total variation of the emitted law, from logits in float64, without sampling.", ""]
    lines += [line(head), line(["---"] * len(head))]
    for row in table.all("law"):
        keys = "to_target", "to_draft", "bonus_to_target", "acceptance", "between", "contexts"
        lines.append(line([anchor(row), row["method"], describe(row), *(number(row, key, ".3g") for key in keys)]))
    return lines


def line(cells: list[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def anchor(row: Row) -> str:
    """The label of a row, with the target of links to it."""
    return f'<a id="{row["id"]}"></a>{short(row["id"])}'


def machines(table: Table) -> list[str]:
    """Sentences on the machines and the models."""
    out = [
        f"Models: {table.about['models']}. Texts: " + ", ".join(f"{n} of {g}" for g, n in table.about["groups"].items())
    ]
    if table.fixture:
        out.append(
            "**These are fixtures: no weights were fetched. The numbers show that the scripts run, nothing else.**"
        )
    for i, machine in enumerate(table.about["machines"]):
        values = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "models")
        out.append(f"Machine {i + 1}: {values}.")
    if "training" in table.about:
        out.append("Training: " + ", ".join(f"{key} {value}" for key, value in table.about["training"].items()) + ".")
    return out


def page(found: list[Table], images: str) -> str:
    """The page, with links to plots that begin with `images`."""
    intro = (Path(__file__).parent / "introduction.md").read_text()
    lines = ["<!-- Written by bench/experiments/report.py from bench/experiments/results. -->", "", intro.rstrip()]
    for title, claim_fn in CLAIMS:
        lines += ["", f"## {title}"]
        if not found:
            lines += ["", "No row answers this yet: the experiments have not run."]
        for table in found:
            sentences = claim_fn(table) or ["No row answers this yet."]
            lines += [
                "",
                f"**{table.name}**",
                "",
                *(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in sentences),
            ]
    for table in found:
        lines += ["", f"## Rows: {table.name}", "", *(f"{text}\n" for text in machines(table))]
        for name, title in plots.names(table).items():
            lines += [f"![{title}]({images}/{name}.svg)", ""]
        lines += tables(table)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the page of the experiments.")
    parser.add_argument("--tables", type=Path, default=caches.RESULTS)
    parser.add_argument("--out", type=Path, help="a folder for the page and its plots, in place of the repository's")
    options = parser.parse_args()
    found = [Table(path) for path in sorted(options.tables.glob("*.json"))]
    images = options.out or ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for table in found:
        plots.draw(table, images)
    if options.out:
        (options.out / "REPORT.md").write_text(page(found, "."))
        print(options.out / "REPORT.md")
        return
    (Path(__file__).parent / "REPORT.md").write_text(page(found, "../../docs/images"))
    (ROOT / "docs" / "experiments.md").write_text(page(found, "images"))


if __name__ == "__main__":
    main()
