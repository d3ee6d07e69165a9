"""Decoding speed of each model family, beside its target and transformers: writes results/models_DEVICE.{json,md}.

python bench/bench_models.py
"""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click
import decoding
import jax
import numpy as np
import timing
from decoding import MAX_NEW_TOKENS, NUM_DRAFT, PROMPT_LENGTH
from flax import nnx
from gpu import results

from specsamp_jax import models

GOAL = 2.0  # tokens per second at batch 1, relative to transformers' assisted generation
BATCH_SIZES = 1, 8
NAMES = "speculative", "target_alone"

# Sizes of the target (9.4 million parameters) and of the drafter (1.4 million), for every family.
VOCAB_SIZE = 8192
TARGET = {
    "hidden_size": 320,
    "intermediate_size": 864,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 40,
}
DRAFTER = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (models.Llama, models.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (models.Qwen2, models.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (models.Qwen3, models.Qwen3Config, {"tie_word_embeddings": True}),
    "gemma": (models.Gemma, models.GemmaConfig, {}),
    "gemma2": (models.Gemma2, models.Gemma2Config, {"query_pre_attn_scalar": 40}),
}
# Standard deviation of each model's logits. The models are independent, but p and q are flat: sum min(p, q) is .7.
LOGIT_STDDEV = 0.6


class Case(NamedTuple):
    """One family, its parameter counts (target, drafter), and the contenders' results by batch size."""

    name: str
    num_params: tuple[int, int]
    results: dict[int, dict[str, Any]]


def make_pair(family: str, folder: Path) -> decoding.Pair:
    """Random models of a family, saved as checkpoints that specsamp and transformers both load."""
    module_fn, config_fn, changes = FAMILIES[family]
    for seed, (name, sizes) in enumerate({"target": TARGET, "drafter": DRAFTER}.items()):
        module = module_fn(config_fn(vocab_size=VOCAB_SIZE, **sizes, **changes), rngs=nnx.Rngs(seed))
        # The features after the last norm have root mean square 1, so the head alone sets the scale of the logits.
        scale = LOGIT_STDDEV / sizes["hidden_size"] ** 0.5
        head = module.vocabulary.head
        head.set_value(jax.random.normal(jax.random.key(seed), head.shape[::-1]).T * scale)
        models.save_checkpoint(folder / name, module, dtype=np.float32)
    return decoding.load_pair(folder)


def compare(family: str, peers: timing.Peers | None, folder: Path, *, rounds: int) -> Case:
    """Times the contenders of one family; transformers' assisted generation runs at batch 1 only."""
    pair, results = make_pair(family, folder / family), {}
    for batch_size in BATCH_SIZES:
        rng = np.random.default_rng(batch_size)
        prompts = list(rng.integers(VOCAB_SIZE, size=(rounds, batch_size, PROMPT_LENGTH), dtype=np.int32))
        contenders = [decoding.generate_contender(name, pair, prompts) for name in NAMES]
        if peers and batch_size == 1:
            contenders += decoding.peer_contenders(pair, prompts, peers)
        results[batch_size] = decoding.race(contenders, pair, prompts, reference=NAMES[0])
    target, drafter = (sum(x.size for x in jax.tree.leaves(model.params)) for model in (pair.target, pair.drafter))
    return Case(family, (target, drafter), results)


def rate(entry: dict[str, Any]) -> float:
    """Tokens per second, the median of the rounds."""
    return entry["tokens_per_second"]["median"]


def best(result: dict[str, Any], beginning: str) -> str | None:
    """Name of the fastest contender whose name starts with `beginning`; None if there is no such contender."""
    return max((name for name in result if name.startswith(beginning)), key=lambda n: rate(result[n]), default=None)


def table_lines(cases: list[Case]) -> list[str]:
    """Markdown tables of all families, one table per batch size."""
    lines = []
    for batch_size in BATCH_SIZES:
        header = ["family", "tokens per step", *NAMES, "speed over the target alone"]
        header += (
            ["transformers, assisted", "transformers, alone", "speed over its assisted"] if batch_size == 1 else []
        )
        rows = []
        for case in cases:
            result = case.results[batch_size]
            speculative, alone = (result[name] for name in NAMES)
            row = [case.name, f"{speculative['tokens_per_step']:.2f}", f"{rate(speculative):.0f}", f"{rate(alone):.0f}"]
            row.append(f"{alone['times_reference']['median']:.2f} x")
            assisted, generate = (best(result, f"transformers_{kind}") for kind in ("assisted", "generate"))
            if batch_size == 1 and assisted and generate:
                row += [f"{rate(result[name]):.0f}" for name in (assisted, generate)]
                row.append(f"{result[assisted]['times_reference']['median']:.2f} x")
            rows.append(row + [""] * (len(header) - len(row)))
        lines += [f"## Batch {batch_size}", "", *results.table(header, rows), ""]
    return lines


def goal_lines(cases: list[Case]) -> list[str]:
    """Markdown lines that compare the smallest speed-up with the goal."""
    times = {}
    for case in cases:
        if assisted := best(case.results[1], "transformers_assisted"):
            times[case.name] = case.results[1][assisted]["times_reference"]["median"]
    if not times:
        return []
    least = min(times, key=lambda name: times[name])
    met = "met" if times[least] >= GOAL else "not met"
    ratio = f"{times[least]:.2f} times the speed of transformers' assisted generation"
    return [f"Smallest ratio: {ratio} ({least}; goal {GOAL}: {met}).", ""]


NOTES = f"""\
Random weights in float32; specsamp and transformers load the same files. The target has 6 layers of width 320, the
drafter 2 layers of width 128; the vocabulary has {VOCAB_SIZE:,} tokens. The two models are independent; their logits
have a standard deviation of {LOGIT_STDDEV}, so that p and q overlap about as much as those of trained pairs do. K =
{NUM_DRAFT}, temperature 1 without filters; {MAX_NEW_TOKENS} new tokens after {PROMPT_LENGTH} random tokens, no end
token. In a round all contenders continue the same prompt. Speeds are in tokens per second: new tokens over wall
time, prefill included, median of the rounds. transformers has its default top-k switched off and drafts {NUM_DRAFT}
tokens per step by a constant schedule without a confidence threshold. It ran with its default number of threads and
with one: the faster is in the table, both are in the JSON. Ratios are medians of the ratios within a round.
transformers' assisted generation supports batch 1 only."""


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), default=list(FAMILIES))
@click.option("--rounds", default=5)
@click.option("--out", type=click.Path(path_type=Path), help="Without suffix; results/models_DEVICE unless given.")
def main(families: tuple[str, ...], rounds: int, out: Path | None) -> None:
    about = timing.environment()
    peers = timing.Peers() if timing.Peers.are_installed() else None
    watch = timing.Watch(*([peers.pid] if peers else []))
    with tempfile.TemporaryDirectory() as folder:
        cases = [compare(family, peers, Path(folder), rounds=rounds) for family in families]
    about |= {"others": watch.others(), "num_params": {case.name: case.num_params for case in cases}}
    if peers:
        about["peers"] = peers.about
        peers.close()
    lines = ["# Model families", "", *timing.environment_lines(about), "", *NOTES.splitlines(), ""]
    lines += [*goal_lines(cases), *table_lines(cases)]
    rows = [
        timing.result_row({"family": case.name, "batch_size": batch_size, "contender": name}, entry)
        for case in cases
        for batch_size, result in case.results.items()
        for name, entry in result.items()
    ]
    timing.write(out or timing.RESULTS / f"models_{about['platform']}", about, rows, lines)


if __name__ == "__main__":
    main()
