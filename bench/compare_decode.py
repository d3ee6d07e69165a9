"""The trained pair against its target alone and against transformers: writes results/decode_DEVICE.{json,md}.

python bench/compare_decode.py
"""

from pathlib import Path
from typing import Any

import click
import decoding
import timing
from decoding import MAX_NEW_TOKENS, NUM_DRAFT

REFERENCE = "speculative"
GOAL = 3.0  # times the tokens a second of its assisted generation


def compare(pair: decoding.Pair, peers: timing.Peers | None, batch_size: int, *, rounds: int) -> dict[str, Any]:
    """Times all contenders on held-out prompts, and the parts of a step."""
    prompts = decoding.held_out_prompts(rounds, batch_size)
    contenders = [decoding.generate_contender(name, pair, prompts) for name in decoding.options(pair)]
    if peers:
        contenders += decoding.peer_contenders(pair, prompts, peers)
    result = decoding.race(contenders, pair, prompts, reference=REFERENCE)
    parts = decoding.parts(pair, prompts[0], num_loops=max(2, 5 * rounds), repeats=5)
    return {"contenders": result, "parts": parts}


def batch_lines(batch_size: int, result: dict[str, Any]) -> list[str]:
    """One batch size in Markdown."""
    rows = []
    for name, entry in result["contenders"].items():
        rate, by_position = entry["tokens_a_second"], entry["acceptance_by_position"]
        rows.append(
            [
                name,
                f"{rate['median']:.0f}",
                f"{rate['p10']:.0f} to {rate['p90']:.0f}",
                f"{entry['times_reference']['median']:.2f} x",
                f"{entry['tokens_a_step']:.2f}",
                " ".join("-" if a is None else f"{a:.2f}" for a in by_position or []),
            ]
        )
    header = ["contender", "tokens/s", "p10 to p90", f"time of {REFERENCE}", "tokens a step", "acceptance by position"]
    parts = [[name, f"{1e6 * seconds:.0f}"] for name, seconds in result["parts"].items()]
    parts += [[f"one step, {name}", f"{1e6 * step_seconds(result, name):.0f}"] for name in (REFERENCE, "target_alone")]
    tables = timing.table(header, rows), timing.table(["part", "us"], parts)
    return [f"## Batch {batch_size}", "", *tables[0], "", *tables[1], ""]


def step_seconds(result: dict[str, Any], name: str) -> float:
    """What a step of the loop takes on average, the prefill left out."""
    entry = result["contenders"][name]
    num_steps = MAX_NEW_TOKENS / entry["tokens_a_step"]
    prefill = result["parts"]["prefill of both" if name == REFERENCE else "prefill of the target"]
    return (entry["seconds"]["median"] - prefill) / num_steps


def goal_lines(result: dict[str, Any]) -> list[str]:
    """Batch 1: what was aimed at and what was measured."""
    times = {name: entry["times_reference"]["median"] for name, entry in result["contenders"].items()}
    lines = [f"Speculation makes {times['target_alone']:.2f} times the tokens a second of the target alone."]
    for name in times:
        if name.startswith("transformers_assisted"):
            met = "met" if times[name] >= GOAL else "not met"
            lines += [f"It makes {times[name]:.2f} times those of {name} (goal {GOAL}: {met})."]
    return lines


NOTES = f"""\
The pair in the package, float32, K = {NUM_DRAFT}, temperature 1 without filters; {MAX_NEW_TOKENS} new tokens behind
{decoding.PROMPT_LENGTH} of a held-out docstring, no end token; the same prompt for all in a round. Tokens a second are
new tokens over wall time, prefill included: median of the rounds, first and last decile. "time of" is the median
ratio of times within a round. A step of a batch counts as one step of each row. Threads are each library's default
unless the name says otherwise. Parts are timed alone, in a compiled loop, the least of five; the steps are the
contenders' times over their steps."""


@click.command()
@click.option("--batch", "batch_sizes", multiple=True, type=int, default=[1, 8])
@click.option("--rounds", default=20)
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/decode_DEVICE unless given.")
def main(batch_sizes: tuple[int, ...], rounds: int, out: Path | None) -> None:
    about = timing.environment()
    pair = decoding.load_pair()
    peers = timing.Peers() if timing.Peers.are_installed() else None
    watch = timing.Watch(*([peers.pid] if peers else []))
    results = {batch_size: compare(pair, peers, batch_size, rounds=rounds) for batch_size in batch_sizes}
    about["others"] = watch.others()
    if peers:
        about["peers"] = peers.about
        peers.close()
    lines = ["# Decoding", "", *timing.environment_lines(about), "", *NOTES.splitlines(), ""]
    if 1 in results:
        lines += [*goal_lines(results[1]), ""]
    for batch_size, result in results.items():
        lines += batch_lines(batch_size, result)
    timing.write(out or timing.RESULTS / f"decode_{about['platform']}", {"about": about, "results": results}, lines)


if __name__ == "__main__":
    main()
