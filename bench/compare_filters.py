"""Time of `verify` with top-k and top-p relative to `verify` without filters: writes results/filters_DEVICE.{json,md}.

python bench/compare_filters.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import jax
import jax.numpy as jnp
import numpy as np
import timing
from gpu import results

import specsamp_jax as ss

VOCAB_SIZE, NUM_DRAFT = 151_936, 5
NUM_SETS = 3
OFF = "off"


def off_as_arrays(batch_size: int) -> ss.SamplingParams:
    """Filters that are off, as traced arrays, so that the compiled program cannot leave them out."""
    return ss.SamplingParams(1.0, jnp.zeros(batch_size, int), jnp.ones(batch_size), jnp.zeros(batch_size))


SAMPLING = {
    "k50, p.95": ss.SamplingParams(1.0, 50, 0.95),
    "T.7, k20, p.8": ss.SamplingParams(0.7, 20, 0.8),
    "p.95": ss.SamplingParams(top_p=0.95),
    "k1000": ss.SamplingParams(top_k=1000),
}


class Inputs(NamedTuple):
    """Arguments of `verify`."""

    key: jax.Array
    target_logits: jax.Array
    draft: ss.Draft


def make_inputs(batch_size: int, kind: str, seed: int) -> Inputs:
    """Random inputs: "flat" logits are normal times 3; "peaked" ones follow Zipf's law with exponent 2, plus noise."""
    rng = np.random.default_rng(seed)
    shape = batch_size, NUM_DRAFT + 1, VOCAB_SIZE
    target = rng.standard_normal(shape, np.float32)
    if kind == "flat":
        target *= 3
    else:
        target += rng.permutation(-2 * np.log1p(np.arange(VOCAB_SIZE))).astype("f")
    draft_logits = target[:, :NUM_DRAFT] + rng.standard_normal((batch_size, NUM_DRAFT, VOCAB_SIZE), np.float32) / 4
    draft = ss.Draft(jnp.asarray(draft_logits.argmax(-1), jnp.int32), jnp.asarray(draft_logits))
    return Inputs(jax.random.key(seed), jnp.asarray(target), draft)


def verify(inputs: Inputs, sampling: ss.SamplingParams | None) -> Any:
    """`verify` with the same filters on target and draft."""
    return ss.verify(inputs.key, inputs.target_logits, inputs.draft._replace(sampling=sampling), sampling)


@click.command()
@click.option("--rounds", default=15)
@click.option("--burst", default=2, help="Timed calls of a contender in a round.")
@click.option("--batch-size", "batch_sizes", multiple=True, type=int, default=[1, 8])
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/filters_DEVICE unless given.")
def main(rounds: int, burst: int, batch_sizes: tuple[int, ...], out: Path | None) -> None:
    about, watch, rows = timing.environment(), timing.Watch(), []
    for batch_size in batch_sizes:
        programs: dict[str, Callable[..., Any]] = {
            name: jax.jit(partial(verify, sampling=sampling)) for name, sampling in SAMPLING.items()
        }
        programs["off, as arrays"] = partial(jax.jit(verify), sampling=off_as_arrays(batch_size))
        programs[OFF] = jax.jit(partial(verify, sampling=None))
        for kind in ("flat", "peaked"):
            sets = [(make_inputs(batch_size, kind, seed),) for seed in range(NUM_SETS)]
            contenders = [timing.jax_contender(n, fn, lambda i, s=sets: s[i % NUM_SETS]) for n, fn in programs.items()]
            for contender in contenders:
                contender.run_fn([0])  # Compiles.

            seconds = timing.alternate(contenders, lambda i, _: range(i, i + burst + 1), rounds=rounds, discard=1)
            for name, entry in timing.summary(seconds, dict.fromkeys(programs, OFF)).items():
                labels = {"batch_size": batch_size, "logits": kind, "filters": name}
                rows.append(timing.result_row(labels, entry))
                print(*labels.values(), f"{rows[-1]['times_reference']:.2f}", flush=True)
    about["others"] = watch.others()
    cells = [
        [
            f"B {r['batch_size']}, {r['logits']}, {r['filters']}",
            f"{1e3 * r['seconds']:.1f}",
            f"{r['times_reference']:.2f}",
        ]
        for r in rows
    ]
    lines = ["# Filters", "", *timing.environment_lines(about), ""]
    shapes = f"V {VOCAB_SIZE:,}, K {NUM_DRAFT}, float32"
    lines += [
        f"`verify`, {shapes}: medians over rounds. The ratio is to the time of `verify` without filters.",
        "",
    ]
    lines += results.table(["case", "ms", "time over no filter"], cells)
    timing.write(out or timing.RESULTS / f"filters_{about['platform']}", about, rows, lines)


if __name__ == "__main__":
    main()
