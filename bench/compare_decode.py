"""Decoding speed of the trained pair, beside the target alone and transformers: writes results/decode_DEVICE.{json,md}.

python bench/compare_decode.py
"""

from pathlib import Path
from typing import Any

import click
import decoding
import timing
from decoding import MAX_NEW_TOKENS, NUM_DRAFT
from gpu import results

REFERENCE = "speculative"
GOAL = 3.0  # tokens per second at batch 1, relative to transformers' assisted generation


def compare(pair: decoding.Pair, peers: timing.Peers | None, batch_size: int, *, rounds: int) -> dict[str, Any]:
    """Times all contenders on held-out prompts, then the parts of a step."""
    prompts = decoding.held_out_prompts(rounds, batch_size)
    contenders = [decoding.generate_contender(name, pair, prompts) for name in decoding.options(pair)]
    if peers:
        contenders += decoding.peer_contenders(pair, prompts, peers)
    result = decoding.race(contenders, pair, prompts, reference=REFERENCE)
    parts = decoding.parts(pair, prompts[0], num_loops=max(2, 5 * rounds), repeats=5)
    return {"contenders": result, "parts": parts}


def batch_lines(batch_size: int, result: dict[str, Any]) -> list[str]:
    """Markdown section for one batch size."""
    rows = []
    for name, entry in result["contenders"].items():
        rate, by_position = entry["tokens_per_second"], entry["acceptance_by_position"]
        rows.append(
            [
                name,
                f"{rate['median']:.0f}",
                f"{rate['p10']:.0f} to {rate['p90']:.0f}",
                f"{entry['times_reference']['median']:.2f} x",
                f"{entry['tokens_per_step']:.2f}",
                " ".join(f"{rate:.2f}" for rate in by_position or []),
            ]
        )
    header = [
        "contender",
        "tokens/s",
        "p10 to p90",
        f"time over {REFERENCE}",
        "tokens per step",
        "acceptance by position",
    ]
    parts = [[name, f"{1e6 * seconds:.0f}"] for name, seconds in result["parts"].items()]
    parts += [[f"one step, {name}", f"{1e6 * step_seconds(result, name):.0f}"] for name in (REFERENCE, "target_alone")]
    tables = results.table(header, rows), results.table(["part", "us"], parts)
    return [f"## Batch {batch_size}", "", *tables[0], "", *tables[1], ""]


def step_seconds(result: dict[str, Any], name: str) -> float:
    """Mean seconds per step of the loop, without the prefill."""
    entry = result["contenders"][name]
    num_steps = MAX_NEW_TOKENS / entry["tokens_per_step"]
    prefill = result["parts"]["prefill of both" if name == REFERENCE else "prefill of the target"]
    return (entry["seconds"]["median"] - prefill) / num_steps


def goal_lines(result: dict[str, Any]) -> list[str]:
    """Markdown lines with the speed-ups at batch 1 and the goal."""
    times = {name: entry["times_reference"]["median"] for name, entry in result["contenders"].items()}
    ours = {name: times["target_alone"] / times[name] for name in (REFERENCE, "heuristic", "goodput") if name in times}
    lines = [f"{name}: {gain:.2f} times the speed of the target alone." for name, gain in ours.items()]
    for name in times:
        if name.startswith("transformers_assisted"):
            met = "met" if times[name] >= GOAL else "not met"
            lines += [f"{REFERENCE}: {times[name]:.2f} times the speed of {name} (goal {GOAL}: {met})."]
    return "\n\n".join(lines).splitlines()


NOTES = f"""\
The package's trained pair in float32, K = {NUM_DRAFT}, temperature 1 without filters. {MAX_NEW_TOKENS} new tokens
after {decoding.PROMPT_LENGTH} tokens of a held-out docstring, no end token. In a round all contenders continue the
same prompt. "tokens/s": new tokens divided by wall time, prefill included, as median and first and last decile of
the rounds. "time over {REFERENCE}": a contender's time divided by that of `{REFERENCE}`, as median of the rounds. A
step of a batch counts as one step of each row. Each library uses its default number of threads unless the name says
otherwise. Each part is timed alone in a compiled loop, and the fastest of five runs is shown; "one step" is a
contender's time without its prefill, divided by its steps."""


@click.command()
@click.option("--batch", "batch_sizes", multiple=True, type=int, default=[1, 8])
@click.option("--rounds", default=20)
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/decode_DEVICE unless given.")
def main(batch_sizes: tuple[int, ...], rounds: int, out: Path | None) -> None:
    about = timing.environment()
    pair = decoding.load_pair()
    peers = timing.Peers() if timing.Peers.are_installed() else None
    watch = timing.Watch(*([peers.pid] if peers else []))
    found = {batch_size: compare(pair, peers, batch_size, rounds=rounds) for batch_size in batch_sizes}
    about["others"] = watch.others()
    if peers:
        about["peers"] = peers.about
        peers.close()
    lines = ["# Decoding", "", *timing.environment_lines(about), "", *NOTES.splitlines(), ""]
    if 1 in found:
        lines += [*goal_lines(found[1]), ""]
    for batch_size, result in found.items():
        lines += batch_lines(batch_size, result)
    rows = []
    for batch_size, result in found.items():
        labels = {"batch_size": batch_size}
        rows += [timing.result_row({**labels, "contender": n}, entry) for n, entry in result["contenders"].items()]
        rows += [{**labels, "part": name, "seconds": seconds} for name, seconds in result["parts"].items()]
    timing.write(out or timing.RESULTS / f"decode_{about['platform']}", about, rows, lines)


if __name__ == "__main__":
    main()
