"""Time of the verification step beside the baseline and the peers: writes results/verify_DEVICE.{json,md}.

python bench/compare_verify.py
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import timing
import verification
from cases import CASES, Case
from gpu import results
from peers import tpu_inference

FLOOR = "read_once"
DEFAULT_CASES = ["qwen-K5-B1", "qwen-K5-B8", "llama2-K5-B1", "whisper-K5-B1", "llama3-K5-B1", "gemma-K5-B1"]
TORCH_THREADS = {"transformers": None, "transformers_1_thread": 1}
# Goals for the speed-up over a peer, by case and peer.
GOALS = {
    ("qwen-K5-B1", "tpu_inference"): 8.0,
    ("qwen-K5-B8", "tpu_inference"): 8.0,
    ("qwen-K5-B1", "transformers"): 1.5,
    ("qwen-K5-B1", "transformers_1_thread"): 1.5,
}


def save_sets(sets: verification.Sets, folder: str) -> None:
    """Saves the inputs in a folder, for the peers' process, which runs torch."""
    for i, inputs in enumerate(sets.inputs):
        np.savez(Path(folder, f"{i:04}.npz"), **inputs._asdict())


def compare(case: Case, peers: timing.Peers | None, *, rounds: int, burst: int) -> dict[str, Any]:
    """Checks, then times, all contenders on one case."""
    tasks = {name: task for name, (task, _) in verification.CALLS.items()}
    sets = {task: verification.make_sets(case, task) for task in dict.fromkeys(tasks.values())}
    contenders = [verification.contender(name, sets[task]) for name, task in tasks.items()]
    if peers and case.batch_size == 1:
        with tempfile.TemporaryDirectory() as folder:
            save_sets(sets[verification.PLAIN], folder)
            for name, num_threads in TORCH_THREADS.items():
                one = peers.contender(name, "speculative_sampling", num_threads=num_threads, folder=folder)
                contenders.append(one)
                tasks[name] = verification.PLAIN

    expected = {task: verification.expected_accepted(sets[task]) for task in sets}
    accepted = {}
    for contender in contenders:
        task = tasks[contender.name]
        if contender.name != FLOOR:
            lossy = contender.name == "specsamp_sigmoid"
            accepted[contender.name] = verification.check(contender, sets[task], None if lossy else expected[task])

    def indices(_, turn):
        return range(turn * (burst + 1), (turn + 1) * (burst + 1))

    seconds = timing.alternate(contenders, indices, rounds=rounds, discard=1)
    result = timing.summary(seconds, {name: task.reference for name, task in tasks.items()})
    for name, entry in result.items():
        entry["accepted"] = accepted.get(name)
    return {"case": case._asdict(), "logits_bytes": case.num_bytes, "sets": case.num_sets, "contenders": result}


def case_lines(name: str, result: dict[str, Any]) -> list[str]:
    """Markdown section for one case."""
    floor = result["contenders"][FLOOR]["seconds"]["median"]
    rows = []
    for contender, entry in result["contenders"].items():
        seconds, times = entry["seconds"], entry["times_reference"]
        accepted = "" if entry["accepted"] is None else f"{entry['accepted']:.2f}"
        rows.append(
            [
                contender,
                f"{1e3 * seconds['median']:.3f}",
                f"{1e3 * seconds['p10']:.3f} to {1e3 * seconds['p90']:.3f}",
                f"{times['median']:.2f} x {entry['reference']}",
                f"{result['logits_bytes'] / seconds['median'] / 1e9:.1f}",
                f"{floor / seconds['median']:.2f}",
                accepted,
            ]
        )
    header = ["contender", "ms", "p10 to p90", "time", "GB/s", "share of floor", "accepted"]
    return [f"## {name}", "", *results.table(header, rows), ""]


def goal_lines(found: dict[str, Any]) -> list[str]:
    """Markdown table of goals and measured speed-ups."""
    rows = []
    for (case, peer), goal in GOALS.items():
        entry = found.get(case, {}).get("contenders", {}).get(peer)
        if entry:
            times = entry["times_reference"]["median"]
            rows.append([f"{case} against {peer}", f"{goal} x", f"{times:.2f} x", "yes" if times >= goal else "no"])
    return [*results.table(["faster than", "goal", "measured", "met"], rows), ""] if rows else []


NOTES = """\
"ms": median over rounds of each round's median; "p10 to p90": its first and last decile. "time": a contender's time
divided by that of the named reference, as median of the rounds. float32 logits, temperature 1. "GB/s" counts every
logit once. "share of floor": the time of one maximum over all logits, divided by the contender's. "accepted": the
mean number of accepted drafts, checked against the exact expectation before timing. Each library uses its default
number of threads unless the name says otherwise. bench/README.md describes the contenders and their inputs."""


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), default=DEFAULT_CASES)
@click.option("--rounds", default=30)
@click.option("--burst", default=5, help="Timed calls of a contender in a round.")
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/verify_DEVICE unless given.")
def main(names: tuple[str, ...], rounds: int, burst: int, out: Path | None) -> None:
    about = timing.environment()
    if tpu_inference.is_installed():
        about["versions"]["tpu-inference"] = tpu_inference.version()
    peers = timing.Peers() if timing.Peers.are_installed() else None
    watch = timing.Watch(*([peers.pid] if peers else []))
    results = {}
    for name in names:
        print(name, flush=True)
        results[name] = compare(CASES[name], peers, rounds=rounds, burst=burst)
    about["others"] = watch.others()
    if peers:
        about["peers"] = peers.about
        peers.close()
    lines = ["# The sampling step", "", *timing.environment_lines(about), "", NOTES, "", *goal_lines(results)]
    lines += itertools.chain.from_iterable(case_lines(name, result) for name, result in results.items())
    rows = [
        timing.result_row({**result["case"], "contender": contender}, entry)
        for result in results.values()
        for contender, entry in result["contenders"].items()
    ]
    timing.write(out or timing.RESULTS / f"verify_{about['platform']}", about, rows, lines)


if __name__ == "__main__":
    main()
