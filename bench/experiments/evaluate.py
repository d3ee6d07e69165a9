"""Runs a task's experiments and keeps each finished row; rows that are there are not computed again.

    python bench/experiments/evaluate.py TASK [--quick] [--stage STAGE] [--seconds S] [--texts N] [--dtype DTYPE]

TASK is `summarization`, `asr` or `qwen`. The stages, in order: `contexts` saves logits of target and drafter on real
contexts, `laws` computes what each rule emits from them, `calls` times one call on them, `runs` generates the texts.
Without --stage all run. Rows go to raw/ in the folder of `caches.CACHE`, one JSON line each; `score.py` makes tables of
them.

Processes share the work: with `--part i/n`, `runs` generates the rows of every n-th program from the i-th on, into
runs-i.jsonl, and `calls` times every n-th call, into calls-i.jsonl. Those on one GPU name one file with `--lock`, so
that one measures at a time. Programs are traced and lowered in Python, one at a time in a process: for the kernels of
this package that takes longer than to compile them, and four processes per GPU keep it short.
"""

import argparse
import concurrent.futures
import datetime
import functools
import importlib
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import caches
import calls
import jax
import laws
import numpy as np
import runs
import settings
import tasks
from locks import Lock

NUM_CONTEXTS, NUM_ROWS = 200, 6
QUICK_TEXTS = 4
FEWER_TEXTS = 104
"""Texts of rows with one text at a time, which take eight times as long."""


class Rows:
    """A file of JSON lines by name; a line that is there is not written again."""

    def __init__(self, path: Path):
        self.path, self.names = path, set()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self.names = {json.loads(line)["name"] for line in path.read_text().splitlines()}

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Appends a finished row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **row}, ensure_ascii=False) + "\n")
        self.names.add(name)


def about(task: tasks.Task, dtype: str | None) -> dict[str, Any]:
    """The machine and the versions with which a row is computed."""
    device = jax.devices()[0]
    return {
        "models": task.models,
        "device": platform.machine() if device.platform == "cpu" else device.device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "weights": dtype or "as stored",
        "kernels": "on" if device.platform == "gpu" else "off",
        "drafts": "counted within texts",
        "date": datetime.date.today().isoformat(),
    }


def show(done: int, total: int, text: str) -> None:
    """A progress bar, on standard error."""
    filled = 24 * done // max(total, 1)
    end = "\r" if sys.stderr.isatty() else "\n"
    print(f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {text:60.60}", end=end, file=sys.stderr, flush=True)


def save_contexts(task: tasks.Task, folder: Path, num_texts: int) -> None:
    """Writes target.npy and draft.npy, `[N, R, V]` in float32."""
    for name, rows in zip(("target", "draft"), tasks.contexts(task, num_texts, NUM_ROWS), strict=True):
        np.save(folder / f"{name}.npy", np.asarray(rows, np.float32))


def load_contexts(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `save_contexts` wrote."""
    return np.load(folder / "target.npy"), np.load(folder / "draft.npy")


def run_laws(rows: Rows, wanted: list[settings.Setting], folder: Path, where: dict[str, Any]) -> None:
    """The stage `laws`."""
    target, draft = (each[:NUM_CONTEXTS] for each in load_contexts(folder))
    missing = [setting for setting in wanted if setting.name not in rows.names]
    with concurrent.futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as pool:
        futures = [pool.submit(laws.measure, setting, target, draft) for setting in missing]
        for i, (setting, future) in enumerate(zip(missing, futures, strict=True)):
            rows.add(setting.name, {**future.result(), **where})
            show(i + 1, len(missing), f"laws: {setting.name}")


def run_calls(rows: Rows, wanted: list[settings.Setting], folder: Path, where: dict[str, Any], lock: Lock) -> None:
    """The stage `calls`."""
    missing = [setting for setting in wanted if setting.name not in rows.names]

    def keep(setting, row):
        rows.add(setting.name, {**row, **where})
        show(missing.index(setting) + 1, len(missing), f"calls: {setting.name} {row.get('us', row)}")

    calls.measure(missing, load_contexts(folder), keep, lock)


def run_texts(
    rows: Rows,
    wanted: list[settings.Setting],
    task: tasks.Task,
    num_texts: int,
    seconds: float,
    where: dict[str, Any],
    lock: Lock,
) -> None:
    """The stage `runs`: compiles all programs side by side, then runs the settings one after the other.

    Programs that take more than half of the time are run last.
    """
    start = time.monotonic()
    task.prepare_fn(num_texts)
    missing = [setting for setting in wanted if setting.name not in rows.names]
    programs: dict[Any, settings.Setting] = {}
    for setting in missing:
        programs.setdefault(runs.program(setting), setting)
    pool = concurrent.futures.ThreadPoolExecutor(calls.THREADS)
    with lock.shared():
        futures = {key: pool.submit(runs.warm_up, setting, task) for key, setting in programs.items()}
        done, _ = concurrent.futures.wait(futures.values(), timeout=seconds / 2)
    show(len(done), len(futures), f"programs compiled, {time.monotonic() - start:.0f} s")
    for i, setting in enumerate(sorted(missing, key=lambda s: futures[runs.program(s)] not in done)):
        left = seconds - (time.monotonic() - start)
        try:
            if left <= 0:
                raise TimeoutError
            futures[runs.program(setting)].result(max(left, 0))
        except TimeoutError:
            print(f"out of time: {len(missing) - i} rows are left, first {setting.name}", file=sys.stderr)
            break
        except Exception as error:
            print(f"failed: {setting.name}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
            continue
        most = num_texts if setting.batch_size > 1 else min(num_texts, FEWER_TEXTS)
        with lock.exclusive():
            texts, num_tokens, counts = runs.run(setting, task, most - most % setting.batch_size)
        row = {"setting": setting._asdict(), **counts._asdict(), "num_tokens": num_tokens, "texts": texts}
        rows.add(setting.name, {**row, **where})
        show(i + 1, len(missing), f"runs: {setting.name} {counts.seconds:.1f} s")
    pool.shutdown(wait=False, cancel_futures=True)


def share(wanted: list[settings.Setting], part: int, parts: int) -> list[settings.Setting]:
    """The settings of every `parts`-th program: no program is compiled twice."""
    order = list(dict.fromkeys(map(runs.program, wanted)))
    return [setting for setting in wanted if order.index(runs.program(setting)) % parts == part]


def make_task(name: str, *, quick: bool, dtype: str | None) -> tasks.Task:
    """The task with its trained models; in a quick run with the fixture that stands for them."""
    module = importlib.import_module(name)
    return module.make_fixture(QUICK_TEXTS) if quick else module.make_task(dtype)


def describe(task: tasks.Task) -> dict[str, Any]:
    """References and trivial outputs, which `score.py` needs."""
    fields = "models", "metric", "ids", "groups", "references", "trivial"
    return {field: value for field, value in task._asdict().items() if field in fields}


def main() -> None:
    parser = argparse.ArgumentParser(description="Runs a task's experiments.")
    parser.add_argument("task", choices=("summarization", "asr", "qwen"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--stage", choices=("contexts", "laws", "calls", "runs"))
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--texts", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seeds", type=int, help="leaves out the rows with more seeds than this")
    parser.add_argument("--lock", type=Path)
    options = parser.parse_args()

    task = make_task(options.task, quick=options.quick, dtype=options.dtype)
    folder = caches.CACHE / "raw" / (task.name + ("_quick" if options.quick else ""))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(describe(task), ensure_ascii=False))
    where, stage = about(task, options.dtype), options.stage
    num_texts = min(options.texts or len(task.ids), QUICK_TEXTS if options.quick else len(task.ids))
    # Whole batches only: a row of padding would be counted.
    num_texts -= num_texts % (4 if options.quick else 8)
    plan = settings.plan(task.name)
    planned, called, law_rows = map(settings.expand, (settings.QUICK if options.quick else plan.runs, *plan[1:]))
    wanted = [each for each in planned if each.seed < (options.seeds or each.seed + 1)]
    if options.quick:
        chosen = "baseline", "ours", "sigmoid 2e4"
        called = [settings.Setting(method, batch_size=4) for method in chosen]
        law_rows = [settings.Setting(method) for method in (*chosen, "calibrated")]
    file, lock = functools.partial(Path, folder), Lock(options.lock)
    if stage in (None, "contexts") and law_rows and not file("draft.npy").exists():
        with lock.shared():
            save_contexts(task, folder, min(num_texts, NUM_CONTEXTS))
    if stage in (None, "laws") and law_rows:
        run_laws(Rows(file("laws.jsonl")), law_rows, folder, where)
    part, parts = map(int, options.part.split("/"))
    suffix = ".jsonl" if parts == 1 else f"-{part}.jsonl"
    if stage in (None, "calls") and called:
        run_calls(Rows(file(f"calls{suffix}")), called[part::parts], folder, where, lock)
    if stage in (None, "runs"):
        rows, mine = Rows(file(f"runs{suffix}")), share(wanted, part, parts)
        run_texts(rows, mine, task, num_texts, options.seconds, where, lock)


if __name__ == "__main__":
    main()
