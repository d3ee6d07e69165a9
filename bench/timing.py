"""Timing of interleaved contenders in rounds, and the result files."""

import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
from gpu import results

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
# Pause before a contender runs: idle worker threads of the previous one may still spin for some milliseconds.
SETTLE_SECONDS = 0.02


class Contender(NamedTuple):
    """One contender of a comparison.

    Attributes:
      name: Its name in the results.
      run_fn: Runs it once for each index of an input; returns the seconds and the result of each call.
    """

    name: str
    run_fn: Callable[[Sequence[int]], tuple[list[float], list[Any]]]


def jax_contender(name: str, fn: Callable[..., Any], arguments_fn: Callable[[int], tuple]) -> Contender:
    """A contender in this process. Making the arguments is not timed; waiting for the result is."""

    def run(indices):
        seconds, made = [], []
        for index in indices:
            arguments = jax.block_until_ready(arguments_fn(index))
            began = time.perf_counter()
            result = jax.block_until_ready(fn(*arguments))
            seconds.append(time.perf_counter() - began)
            made.append(result)
        return seconds, made

    return Contender(name, run)


class Peers:
    """A second process that runs the contenders which need torch."""

    def __init__(self):
        server = Path(__file__).parent / "peers" / "server.py"
        self._process = subprocess.Popen(
            [PEERS_PYTHON, server], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = {}

    @staticmethod
    def are_installed() -> bool:
        """Whether peers/make_env.sh has run."""
        return PEERS_PYTHON.exists()

    def contender(self, name: str, kind: str, *, num_threads: int | None = None, **arguments: Any) -> Contender:
        """Prepares a contender in the process (kinds: see peers/server.py); threads None: torch's default."""
        request = {"prepare": name, "kind": kind, "arguments": arguments, "num_threads": num_threads}
        self.about = self._ask(request)

        def run(indices):
            answer = self._ask({"run": name, "indices": list(indices)})
            return answer["seconds"], answer["made"]

        return Contender(name, run)

    def _ask(self, request: dict) -> dict:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("The peers' process ended; see its messages above.")
        return json.loads(line)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def alternate(
    contenders: Iterable[Contender], indices_fn: Callable[[int, int], Sequence[int]], *, rounds: int, discard: int = 0
) -> dict[str, list[list[float]]]:
    """Seconds of each call, by contender and round.

    Each round runs every contender once and starts with another one. A turn is one contender in one round; turns are
    counted over all rounds. `indices_fn(round, turn)` returns the indices of the inputs to run on. The first `discard`
    calls of a turn are not recorded, because they are slowed by the contender before.
    """
    contenders = list(contenders)
    seconds = {contender.name: [] for contender in contenders}
    for i in range(rounds):
        first = i % len(contenders)
        for j, contender in enumerate(contenders[first:] + contenders[:first]):
            time.sleep(SETTLE_SECONDS)
            measured, _ = contender.run_fn(indices_fn(i, i * len(contenders) + j))
            seconds[contender.name].append(measured[discard:])
    return seconds


def summary(seconds: dict[str, list[list[float]]], references: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Summarises each contender: spread of the rounds' medians, and of their ratios to the reference's median."""
    medians = {name: [statistics.median(burst) for burst in rounds] for name, rounds in seconds.items()}
    result = {}
    for name, values in medians.items():
        ratios = [value / other for value, other in zip(values, medians[references[name]], strict=True)]
        result[name] = {"seconds": spread(values), "reference": references[name], "times_reference": spread(ratios)}
        result[name]["rounds"] = values
    return result


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and first and last decile."""
    low, *_, high = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else (values[0],) * 2
    return {"median": statistics.median(values), "p10": low, "p90": high}


class Watch:
    """Measures the load of other processes, which slows contenders with synchronised threads the most."""

    def __init__(self, *pids: int):
        self._pids = os.getpid(), *pids
        self._began = self._now()

    def _now(self) -> tuple[float, float]:
        ticks = os.sysconf("SC_CLK_TCK")
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9])
        stats = (Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self._pids)
        own = sum(sum(map(int, fields[11:15])) for fields in stats)  # children that ended included
        return time.perf_counter(), (user + nice + system + sum(rest) - own) / ticks

    def others(self) -> float:
        """Mean number of cores that other processes used since this object was created."""
        seconds, busy = (now - then for now, then in zip(self._now(), self._began, strict=True))
        return busy / seconds


def environment() -> dict[str, Any]:
    """The device, the versions and the command."""
    device = jax.devices()[0]
    names = [line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")]
    return {
        "device": device.device_kind if device.platform != "cpu" else (names or [platform.machine()])[0],
        "platform": device.platform,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])]),
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("specsamp", "jax", "jaxlib")},
    }


def _without_folder(argument: str) -> str:
    """An absolute path, which holds on one machine only, becomes its last part."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu_info() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def environment_lines(about: dict[str, Any]) -> list[str]:
    """Markdown lines of `environment()`; if the peers took part, `about["peers"]` holds their versions."""
    versions = dict(about["versions"])
    if peers := about.get("peers"):
        versions |= {f"{name} (peers)" if name in versions else name: v for name, v in peers["versions"].items()}
    return [
        f"{about['device']}, {about['cores']} cores; other processes used {max(about['others'], 0):.2f} cores "
        f"meanwhile. {about['date']}. " + ", ".join(f"{name} {v}" for name, v in versions.items()) + ".",
        "",
        f"    {about['command']}",
    ]


def result_row(labels: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Returns one contender's result as a flat row: labels, seconds, time relative to the reference, other fields.

    The times of single rounds are left out; median and deciles are kept.
    """
    seconds, times = entry["seconds"], entry["times_reference"]
    timed = {**labels, "seconds": seconds["median"], "p10": seconds["p10"], "p90": seconds["p90"]}
    timed |= {"reference": entry["reference"], "times_reference": times["median"]}
    rest = {k: v for k, v in entry.items() if k not in ("seconds", "times_reference", "reference", "rounds")}
    return timed | {k: v["median"] if isinstance(v, dict) else v for k, v in rest.items()}


def four_digits(value: Any) -> Any:
    """Rounds every number in a row or a list to four significant digits."""
    if isinstance(value, dict):
        return {key: four_digits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [four_digits(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def write(out: Path, about: dict[str, Any], rows: Iterable[dict[str, Any]], lines: Sequence[str]) -> None:
    """Writes OUT.json, one line per row and without spaces, and OUT.md; prints the contents of OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    results.write(out.with_suffix(".json"), four_digits(about), four_digits(list(rows)))
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
