"""Makes the tables of a task from its raw rows: quality, acceptance, calls, times and laws, one line per row.

    python bench/experiments/score.py TASK [--quick] [--laws] [--out FOLDER]

Runs that differ in their seed only are one row: each text's scores are averaged over seeds. With --laws only raw rows
of laws are read: the repository's table keeps its other rows, and its laws at other settings.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import caches
import metrics
import numpy as np
import settings

FIELDS = "method", "drafter", "temperature", "top_k", "dtype", "batch_size", "num_draft", "top_p"
DEFAULTS = {"drafter": "model", "temperature": 1.0, "top_k": 0, "dtype": "float32", "batch_size": 8, "num_draft": "5"}
DEFAULTS |= {"top_p": 1.0}
DEFAULT_SETTING = dict(DEFAULTS)
DEFAULTS |= {"seeds": 1, "machine": 0, "empty": 0, "calibration": {}}
"""Values that a table leaves out."""

PLAIN = {**DEFAULT_SETTING, "temperature": None}
"""Settings of rows that are split by test set: the defaults, greedy or sampled."""

WHERE = "models", "device", "cores", "jax", "python", "weights", "kernels", "drafts", "date"


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, and of its parts NAME-0.jsonl, NAME-1.jsonl ...; of those of one name the last.

    Their order is that of the first file, then of the parts.
    """
    parts = sorted(path.parent.glob(f"{path.stem}-*.jsonl"), key=lambda part: int(part.stem.rpartition("-")[2]))
    files = [part for part in (path, *parts) if part.exists()]
    rows = (json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines())
    return list({row["name"]: row for row in rows}.values())


def in_order(rows: list[dict[str, Any]], blocks: list[dict[str, tuple]]) -> list[dict[str, Any]]:
    """The rows in the order of their settings in the blocks; others follow as they are."""
    order = {each.name: i for i, each in enumerate(settings.expand(blocks))}
    return sorted(rows, key=lambda row: order.get(row["name"], len(order)))


def setting(row: dict[str, Any]) -> dict[str, Any]:
    """The settings in a row's name, without the seed."""
    values = row["name"].split("|")
    found = dict(zip(FIELDS, values[:-1], strict=False))
    kinds = {"temperature": float, "top_k": int, "batch_size": int, "top_p": float}
    return {"top_p": 1.0} | {name: kinds.get(name, str)(value) for name, value in found.items()}


def digits(value: float, number: int = 4) -> float:
    """A number with few significant digits."""
    return float(f"{value:.{number}g}")


def machine(row: dict[str, Any]) -> dict[str, Any]:
    """The machine that a raw row was computed on."""
    return {name: row[name] for name in WHERE if name in row}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Kind and settings of a row, which no other row of a table has."""
    return row["kind"], *({**DEFAULT_SETTING, **row}[name] for name in FIELDS)


def describe(row: dict[str, Any]) -> str:
    """The settings of a row that are not the defaults, in words."""
    parts = [
        row["drafter"] if row["drafter"] != "model" else "",
        {0.0: "greedy", 1.0: ""}.get(row["temperature"], f"temperature {row['temperature']}"),
        f"top-k {row['top_k']}" if row["top_k"] else "",
        f"top-p {row['top_p']}" if row["top_p"] != 1 else "",
        row["dtype"] if row["dtype"] != "float32" else "",
        f"batch {row['batch_size']}" if row["batch_size"] != 8 else "",
        row["num_draft"] if row["num_draft"] != "5" else "",
        f"{row['seeds']} seeds" if row["seeds"] != 1 else "",
    ]
    return ", ".join(part for part in parts if part)


class Tables:
    """The rows of one task, and the machines that they were computed on."""

    def __init__(self, folder: Path):
        self.folder, self.task = folder, json.loads((folder / "task.json").read_text())
        self.score_fn: Callable[..., metrics.Scores] = metrics.SCORERS[self.task["metric"]]
        self.rows: list[dict[str, Any]] = []
        self.about: dict[str, Any] = {}
        self.num_texts = len(self.task["references"])
        self.plan = settings.plan(folder.name)

    def start_from(self, table: Path) -> None:
        """Takes the rows of a table that was made before, and what it says about them."""
        contents = json.loads(table.read_text())
        self.about = contents["about"]
        for row in contents["rows"]:
            machine = {} if row["kind"] == "trivial" else {"machine": self.about["machines"][row.get("machine", 0)]}
            self.rows.append(row | machine)

    def scored(self, texts: list[str]) -> metrics.Scores:
        """Scores of outputs for the first prompts."""
        return self.score_fn(self.task["references"][: len(texts)], texts)

    def add_texts(self) -> None:
        """Rows of kind "text"."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in in_order(read(self.folder / "runs.jsonl"), self.plan.runs):
            groups.setdefault(row["name"].rpartition("|")[0], []).append(row)
        self.num_texts = max(len(rows[0]["texts"]) for rows in groups.values())
        scores = {name: np.mean([self.scored(row["texts"]) for row in rows], 0) for name, rows in groups.items()}
        for name, rows in groups.items():
            found = setting(rows[0])
            num_texts, per_seed = len(rows[0]["texts"]), len(rows)
            # Seeds that were run with the kernels off, or while others used the GPU, do not count for times. Older
            # rows, which counted drafts after the end of a text too, do not count for acceptance if there are others.
            timed = [row for row in rows if row.get("kernels") == "on"] or rows
            timed = [row for row in timed if "shared" not in row] or timed
            counted = [row for row in rows if "drafts" in row] or rows
            calls, seconds = (sum(row[key] for row in timed) / len(timed) for key in ("calls", "seconds"))
            row_calls = sum(row["row_calls"] for row in rows) / per_seed
            tokens = sum(sum(row["num_tokens"]) for row in rows) / per_seed
            drafted, accepted = (np.sum([row[key] for row in counted], 0) for key in ("drafted", "accepted"))
            entry = {"kind": "text", **found, "seeds": per_seed, "texts": num_texts}
            # Acceptance at a position, given that all drafts before it were accepted.
            reached = np.concatenate([drafted[:1], np.minimum(accepted[:-1], drafted[1:])]) if len(drafted) else drafted
            entry |= {
                "quality": [digits(value) for value in metrics.percent(scores[name])],
                "acceptance": [digits(a / r, 3) for a, r in zip(accepted, reached, strict=True) if r > 0],
                "tokens": digits(tokens / num_texts),
                "calls": digits(row_calls / num_texts),
                "batch_calls": digits(calls),
                "ms": digits(1e3 * seconds / num_texts),
                "empty": sum(not text for row in rows for text in row["texts"]),
            }
            if len(drafted):
                entry["accepted"] = digits(np.sum(accepted) / np.sum(drafted), 3)
            if len(timed) > 1:
                times = [1e3 * row["seconds"] / num_texts for row in timed]
                entry["ms_range"] = [digits(min(times)), digits(max(times))]
            decided = sum(row["calibration"].get("num_decided", 0) for row in rows)
            if decided:
                mean, error = (sum(row["calibration"][k] for row in rows) / decided for k in ("sum_bound", "sum_error"))
                largest = max(row["calibration"]["max_bound"] for row in rows)
                entry["bound"] = [digits(mean), digits(largest), digits(error)]
            alone = f"target alone|{name.split('|', 1)[1]}"
            for other in (alone, alone.replace("|1|5", "|8|5"), alone.replace("|heuristic", "|5")):
                other = other.replace("|n-grams|", "|model|")
                if other in groups and name != other:
                    pair = scores[other][:num_texts]
                    entry["difference"] = [digits(x) for x in metrics.interval(scores[name], pair)]
                    if entry["temperature"] == 0:
                        same = zip(rows[0]["texts"], groups[other][0]["texts"], strict=False)
                        entry["same"] = sum(a == b for a, b in same)
                    break
            others = name.split("|", 1)[1]
            if f"drafter alone|{others}" in groups and not name.startswith(("target", "drafter")):
                pair = scores[f"drafter alone|{others}"]
                entry["to_drafter"] = [digits(x) for x in metrics.interval(scores[name], pair)]
            if entry["temperature"] == 0 and f"ours|{others}" in groups:
                same = zip(rows[0]["texts"], groups[f"ours|{others}"][0]["texts"], strict=True)
                entry["same_as_ours"] = sum(a == b for a, b in same)
            plain = {**found, "temperature": None, "method": None} == {**PLAIN, "method": None}
            if plain and len(set(self.task["groups"])) > 1:
                entry["groups"] = self.by_group(scores[name])
            self.rows.append({**entry, "machine": machine(timed[0])})
        trivial = self.scored(self.task["trivial"][: self.num_texts])
        quality = [digits(value) for value in metrics.percent(trivial)]
        self.rows.append({"kind": "trivial", "method": "trivial", "texts": len(trivial), "quality": quality})

    def by_group(self, scores: metrics.Scores) -> dict[str, float]:
        """The first measure in each test set."""
        names = np.array(self.task["groups"][: len(scores)])
        return {name: digits(metrics.percent(scores[names == name])[0], 3) for name in sorted(set(names))}

    def add(self, kind: str, file: str) -> None:
        """Rows of another kind, as they are, in place of those with their settings."""
        old = {identity(row): i for i, row in enumerate(self.rows)}
        for row in in_order(read(self.folder / file), self.plan.calls):
            values = {key: value for key, value in row.items() if key not in (*WHERE, "name")}
            # An acceptance near 1 is told by its distance to 1.
            kept = {key: 8 if key == "acceptance" else 4 for key in values}
            values = {k: digits(value, kept[k]) if isinstance(value, float) else value for k, value in values.items()}
            entry = {"kind": kind, **setting(row), **values, "machine": machine(row)}
            if identity(entry) in old:
                self.rows[old[identity(entry)]] = entry
            else:
                self.rows.append(entry)

    def missing(self, kind: str) -> dict[str, list[str]]:
        """The settings that have no row of this kind, with their methods."""
        blocks, file = {"text": (self.plan.runs, "runs.jsonl"), "call": (self.plan.calls, "calls.jsonl")}[kind]
        names = {row["name"] for row in read(self.folder / file)}
        found: dict[str, list[str]] = {}
        for wanted in settings.expand(blocks):
            if wanted.name not in names:
                changed = {name: value for name, value in wanted._asdict().items() if name not in ("method", "seed")}
                words = describe({**DEFAULTS, **changed}) or "defaults"
                group = found.setdefault("more seeds" if wanted.seed else words, [])
                if wanted.method not in group:
                    group.append(wanted.method)
        return found

    def describe_task(self) -> dict[str, Any]:
        """Models, training and notes of the task, the settings without a row, and the texts."""
        about: dict[str, Any] = {"models": self.task["models"], "metric": self.task["metric"], "machines": []}
        training = caches.CACHE / self.folder.name.removesuffix("_quick") / "training.json"
        if training.exists() and "fixture" not in self.task["models"]:
            about["training"] = trained = json.loads(training.read_text())
            # Folders of the machine are no part of the result.
            options = trained.get("options", {}).items()
            trained["options"] = {key: value for key, value in options if "/" not in value and value != "None"}
        notes = self.folder / "notes.json"
        if notes.exists():
            about |= json.loads(notes.read_text())
        if "fixture" not in self.task["models"]:
            about["missing"] = {kind: self.missing(kind) for kind in ("text", "call")}
        tested = self.task["groups"][: self.num_texts]
        sizes = {group: tested.count(group) for group in sorted(set(tested))}
        return about | {"groups": sizes, "all_texts": len(self.task["groups"])}

    def write(self, path: Path) -> None:
        """One line per row."""
        machines: list[dict[str, Any]] = []
        rows = []
        for row in self.rows:
            if "machine" in row:
                if row["machine"] not in machines:
                    machines.append(row["machine"])
                row = {**row, "machine": machines.index(row["machine"])}
            rows.append({key: value for key, value in row.items() if DEFAULTS.get(key) != value})
        lines = ",\n".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows)
        about = {**(self.about or self.describe_task()), "machines": machines}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"about":{json.dumps(about)},\n"rows":[\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the tables of a task.")
    parser.add_argument("task", choices=("summarization", "asr", "qwen", "pair"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--laws", action="store_true", help="keep the repository's rows, and add those of laws")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    name = options.task + ("_quick" if options.quick else "")
    tables = Tables(caches.CACHE / "raw" / name)
    if options.laws:
        tables.start_from(caches.RESULTS / f"{options.task}.json")
    else:
        tables.add_texts()
        tables.add("call", "calls.jsonl")
    tables.add("law", "laws.jsonl")
    # Tables of a quick run are not those that the repository keeps.
    folder = options.out or (caches.CACHE / "quick" if options.quick else caches.RESULTS)
    tables.write(folder / f"{options.task}.json")
    print(folder / f"{options.task}.json", len(tables.rows), "rows")


if __name__ == "__main__":
    main()
