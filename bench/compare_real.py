"""Real checkpoints beside transformers: writes results/real_cpu.json and docs/real-checkpoints.md.

python bench/compare_real.py

A run that was cut off goes on, with the same options, from the finished parts in results/real_cpu.partial.
"""

import functools
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import real_page
import timing
from gpu import results

from specsamp_jax.models.whisper.features import SAMPLE_RATE
from specsamp_jax.speech import load_wav
from specsamp_jax.text import load_tokenizer

NGRAM, WHISPER = "ngram", "whisper-base"
SOUNDS, NUM_SOUNDS = Path("/usr/share/pocketsphinx/test/data/librivox"), 3
DTYPES = ("bfloat16", "float32")
MESSAGES = (
    "Write a Python function that returns the n-th Fibonacci number, with a docstring and tests.",
    "Write a Python class for a stack with push, pop and peek, and explain each method.",
)
QUESTION = "Write a Python function that reverses a string."


class Case(NamedTuple):
    """A checkpoint to run.

    Attributes:
      name: Its name on the page.
      folder: Its folder in `--models`.
      drafter: The folder of its drafter, `ngram`, or None.
    """

    name: str
    folder: str
    drafter: str | None


CASES = {
    "smollm2": Case("SmolLM2-135M-Instruct", "smollm2", NGRAM),
    "qwen-0.5b": Case("Qwen2.5-Coder-0.5B-Instruct", "qwen-0.5b", NGRAM),
    "qwen-1.5b": Case("Qwen2.5-Coder-1.5B-Instruct", "qwen-1.5b", "qwen-0.5b"),
    WHISPER: Case("Whisper base", WHISPER, None),
}


class Worker:
    """A process that holds the models of one system."""

    def __init__(self, system: str, python: Path, specification: dict[str, Any]):
        self.system = system
        file = Path(__file__).parent / "real" / ("ours.py" if system == "specsamp" else "theirs.py")
        specification = specification | {"began": time.time()}
        command = [python, file, json.dumps(specification)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.loaded = self._answer()

    def run(self, index: int) -> dict[str, Any]:
        """Decodes one input."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"index": index}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of {self.system} ended; see its messages above.")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def read_once(folder: Path) -> None:
    """Reads the weights into the page cache, so that no system loads from a cold disk."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            while opened.read(1 << 24):
                pass


def compare(
    case: Case, drafter: str | None, specification: dict[str, Any], pythons: dict[str, Path], rounds: int
) -> Iterator[dict[str, Any]]:
    """Yields the rows of one checkpoint in one dtype, alone or with its drafter.

    Each has processes of its own, so that a peak has nothing of another case in it.
    """
    models = Path(specification["models"])
    for folder in {case.folder, drafter} - {None, NGRAM}:
        read_once(models / str(folder))
    labels = {"model": case.name, "dtype": specification["dtype"], "drafter": drafter}
    specification = specification | {"target": str(models / case.folder)}
    specification |= {"drafter": drafter if drafter in (None, NGRAM) else str(models / drafter)}
    with tempfile.TemporaryDirectory() as cache:
        workers, started = start(specification | {"cache": cache}, pythons)
        rows = measure(workers, len(specification["inputs"]), rounds)
        for worker in workers.values():
            worker.close()
    for system, row in rows.items():
        times = started[system]
        if drafter is None:
            row |= {"load_seconds": times["seconds"], "load_over_weights": times["over_weights"]}
            row |= {"start_seconds": times["seconds"] + times["first"] - row["seconds"]}
            if "cold" in times:
                row |= {"first_start_seconds": times["cold"] - row["seconds"]}
        if "first_over_weights" in times:
            row |= {"first_over_weights": times["first_over_weights"]}
        yield labels | {"system": system} | row


def start(
    specification: dict[str, Any], pythons: dict[str, Path]
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """Returns a worker of each system that has decoded once, and its seconds and peaks until then.

    Of this library two processes run one after the other: the first fills the cache of compiled programs.
    """
    # transformers loads first: its peak while it loads is not beside our weights.
    workers = {"transformers": Worker("transformers", pythons["transformers"], specification)}
    started = {"transformers": first_run(workers["transformers"])}
    cold = Worker("specsamp", pythons["specsamp"], specification)
    compiling = first_run(cold)
    cold.close()
    workers["specsamp"] = Worker("specsamp", pythons["specsamp"], specification)
    started["specsamp"] = first_run(workers["specsamp"])
    started["specsamp"] |= {"cold": compiling["seconds"] + compiling["first"]}
    started["specsamp"] |= {"first_over_weights": compiling["first_over_weights"]}
    started["transformers"].pop("first_over_weights")
    return workers, started


def first_run(worker: Worker) -> dict[str, Any]:
    """Decodes the first input, and returns the seconds and the peak of loading and of this run."""
    first = worker.run(0)
    return worker.loaded | {"first": first["seconds"], "first_over_weights": first["over_weights"]}


def measure(workers: dict[str, Worker], num_inputs: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Runs the systems in turns on each input, and returns medians over rounds and inputs."""
    runs: dict[str, list[dict[str, Any]]] = {system: [] for system in workers}
    for i in range(rounds * num_inputs):
        for system in list(workers)[:: 1 if i % 2 else -1]:
            time.sleep(timing.SETTLE_SECONDS)
            runs[system].append(workers[system].run(i % num_inputs))
    rows = {}
    for system, made in runs.items():
        num_tokens = [run["num_tokens"] for run in made]
        rates = [num / run["seconds"] for num, run in zip(num_tokens, made, strict=True)]
        ratios = [
            other["seconds"] / run["seconds"] for other, run in zip(runs["transformers"], runs[system], strict=True)
        ]
        rows[system] = {
            "tokens_per_second": statistics.median(rates),
            "times_transformers": statistics.median(ratios),
            "cpu_ms_per_token": 1e3 * sum(run["cpu"] for run in made) / sum(num_tokens),
            "tokens_per_pass": sum(num_tokens) / sum(run["passes"] for run in made),
            "seconds": statistics.median(run["seconds"] for run in made),
            "over_weights": made[-1]["over_weights"],
        }
    pairs = list(zip(runs["specsamp"], runs["transformers"], strict=True))[:num_inputs]
    rows["specsamp"]["same_texts"] = sum(a["output"] == b["output"] for a, b in pairs) / num_inputs
    return rows


def specifications(
    models: Path, names: Sequence[str], max_new_tokens: int, folder: Path
) -> Iterator[tuple[Case, dict]]:
    """Yields each checkpoint with what its workers need; sounds become arrays in `folder`."""
    for name in names:
        case = CASES[name]
        if name == WHISPER:
            kind, inputs = "speech", []
            for i, file in enumerate(sorted(SOUNDS.glob("*.wav"))[:NUM_SOUNDS]):
                np.save(folder / f"{i}.npy", load_wav(file)[: 30 * SAMPLE_RATE])
                inputs.append(str(folder / f"{i}.npy"))
        else:
            kind, tokenizer = "text", load_tokenizer(models / case.folder)
            inputs = [tokenizer.encode_chat([{"role": "user", "content": message}]) for message in MESSAGES]
        yield case, {"kind": kind, "models": str(models), "inputs": inputs, "max_new_tokens": max_new_tokens}


def command_row(models: Path, name: str) -> dict[str, Any]:
    """Runs the command on a checkpoint with an empty cache: its standard output and error, and its peak memory."""
    case = CASES[name]
    if name == WHISPER:
        arguments = ["transcribe", str(next(iter(sorted(SOUNDS.glob("*.wav"))))), "--target", case.folder]
        arguments += ["--language", "en"]
    else:
        arguments = ["generate", "--target", case.folder]
        arguments += [] if case.drafter in (None, NGRAM) else ["--draft", str(case.drafter)]
        arguments += ["--chat", QUESTION, "--temperature", "0", "--max-new-tokens", "48"]
    run = "import sys, specsamp, worker; code = specsamp.run(sys.argv[1:]); "
    run += "print(worker.peak_bytes(), file=sys.stderr); sys.exit(code)"
    path = os.pathsep.join([str(timing.ROOT), str(timing.ROOT / "bench" / "real")])
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-c", run, *arguments, "--verbose"]
        environment = os.environ | {"PYTHONPATH": path, "SPECSAMP_CACHE": cache}
        done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=models, env=environment)
    *messages, peak = done.stderr.splitlines()
    # A message about the cache holds a path of this machine.
    messages = [line for line in messages if "programs are kept in" not in line]
    folders = {case.folder, case.drafter} - {None, NGRAM}
    weights = sum(file.stat().st_size for folder in folders for file in (models / str(folder)).glob("*.safetensors"))
    shown = [Path(word).name if word.endswith(".wav") else word for word in arguments]
    command = shlex.join(["specsamp", *shown])
    return {"command": command, "output": done.stdout, "messages": messages, "over_weights": int(peak) / weights}


def fetched() -> Path:
    """The folder that real/fetch.sh fills by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "specsamp" / "real"


@click.command()
@click.option("--models", default=fetched(), type=click.Path(path_type=Path), help="Default: the folder of fetch.sh.")
@click.option("--model", "names", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(DTYPES), default=DTYPES)
@click.option("--rounds", default=2, help="Runs of each input.")
@click.option("--max-new-tokens", default=48)
@click.option("--peers", default=timing.PEERS_PYTHON, type=click.Path(path_type=Path), help="Python with transformers.")
@click.option("--out", default=timing.RESULTS / "real_cpu.json", type=click.Path(path_type=Path))
@click.option("--page-only", is_flag=True, help="Write the page from the results in --out, and measure nothing.")
def main(
    models: Path,
    names: tuple[str, ...],
    dtypes: tuple[str, ...],
    rounds: int,
    max_new_tokens: int,
    peers: Path,
    out: Path,
    page_only: bool,
) -> None:
    if page_only:
        real_page.write_page(out)
        return
    about = timing.environment()
    pythons = {"specsamp": Path(sys.executable), "transformers": peers}
    question = "import torch, transformers as t; print(torch.__version__, t.__version__)"
    versions = subprocess.run([peers, "-c", question], check=True, capture_output=True, text=True).stdout.split()
    about["peers"] = {"versions": dict(zip(("torch", "transformers"), versions, strict=True))}
    models, partial = models.absolute(), out.with_suffix(".partial")
    finished = dict(map(json.loads, partial.read_text().splitlines())) if partial.exists() else {}

    def keep(part: str, rows_fn: Callable[[], Iterable[dict[str, Any]]]) -> None:
        """Runs a part and writes its rows to the file of finished parts, unless they are there."""
        if part not in finished:
            watch, began = timing.Watch(), time.perf_counter()
            finished[part] = {"rows": list(rows_fn()), "others": watch.others()}
            with partial.open("a") as file:
                file.write(json.dumps([part, finished[part]]) + "\n")
            print(f"{part}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as folder:
        for case, specification in specifications(models, names, max_new_tokens, Path(folder)):
            for dtype, drafter in itertools.product(dtypes, dict.fromkeys((None, case.drafter))):
                arguments = case, drafter, specification | {"dtype": dtype}, pythons, rounds
                keep(f"{case.name}, {dtype}, {drafter}", functools.partial(compare, *arguments))
    for name in names:
        keep(f"command with {name}", lambda name=name: [command_row(models, name)])
    about["others"] = max(part["others"] for part in finished.values())
    rows = timing.four_digits([row for part in finished.values() for row in part["rows"]])
    results.write(out, timing.four_digits(about), rows)
    if out.resolve().parent == timing.RESULTS:
        real_page.write_page(out)
    print("\n".join(real_page.page_lines(about, rows)))
    partial.unlink()


if __name__ == "__main__":
    main()
