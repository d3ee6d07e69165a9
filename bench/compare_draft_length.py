"""Speed of `GoodputNumDraft` beside each fixed draft length and the target alone, on the default device.

    python bench/compare_draft_length.py [--batch 1] [--rounds 8] [--drafters good bad n_gram] [--json FILE]

The package's trained pair in float32, temperature 1, 128 new tokens after 32 tokens of a held-out docstring. The "bad"
drafter is the "good" one with the entries of each matrix shuffled. In a round all contenders continue the same prompts,
one contender after the other; times are medians over the rounds. Costs are measured once per drafter, before the
rounds, as `specsamp generate` does. "best" is the fastest contender without goodput: a fixed length, or "alone",
the target. "behind" is the time of goodput divided by that of "best", minus 1. Judge the rule by its largest "behind".
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decoding import MAX_NEW_TOKENS, Pair, held_out_prompts, load_pair

import specsamp_jax as ss

LENGTHS = (0, 1, 2, 4, 8)


def shuffled(model: ss.Model) -> ss.Model:
    """The model with the entries of each array in random order: its drafts are nearly always rejected."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.permutation(np.ravel(x)).reshape(x.shape)), model.params)
    return ss.Model(params, model.apply_fn, model.init_cache_fn)


def contenders(pair: Pair, names: list[str], prompt: np.ndarray) -> dict[str, dict[str, dict[str, Any]]]:
    """Measures the costs of each drafter; returns arguments of `generate` by drafter and contender."""
    drafters = {"good": pair.drafter, "bad": shuffled(pair.drafter), "n_gram": ss.NGramDrafter()}
    found = {}
    for name in names:
        draft = drafters[name]
        costs = ss.measure_costs(
            prompt, target=pair.target, draft=draft, lengths=LENGTHS, max_new_tokens=MAX_NEW_TOKENS
        )
        print(
            name, "costs, relative to a step without drafts:", *(f"{cost / costs[0]:.2f}" for cost in costs), flush=True
        )
        fixed = {str(k): {"draft": draft, "num_draft": k} for k in LENGTHS[1:]}
        goodput = {"draft": draft, "num_draft": ss.GoodputNumDraft(costs, LENGTHS)}
        found[name] = {"alone": {"draft": None}, **fixed, "goodput": goodput}
    return found


def race(pair: Pair, options: dict[str, dict[str, Any]], prompts: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """Seconds (wall and processor time) and steps of each contender, medians over the prompts."""

    def run(name, index):
        began, used = time.perf_counter(), time.process_time()
        text = jax.block_until_ready(
            ss.generate(
                jax.random.key(index),
                prompts[index],
                target=pair.target,
                max_new_tokens=MAX_NEW_TOKENS,
                **options[name],
            )
        )
        return time.perf_counter() - began, time.process_time() - used, int(text.stats.num_steps)

    for name in options:
        run(name, 0)
    rows = {name: [] for name in options}
    for index in range(len(prompts)):
        # Each round starts with another contender, so that none of them is always first.
        turned = list(options)[index % len(options) :] + list(options)[: index % len(options)]
        for name in turned:
            rows[name].append(run(name, index))
    return {
        name: dict(zip(("seconds", "cpu_seconds", "steps"), np.median(values, axis=0).tolist(), strict=True))
        for name, values in rows.items()
    }


def main() -> None:
    """Prints a table per drafter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--drafters", nargs="+", default=["good", "bad", "n_gram"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    pair, prompts = load_pair(), held_out_prompts(arguments.rounds, arguments.batch)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, batch {arguments.batch}, {arguments.rounds} rounds", flush=True)
    results = {}
    for drafter, options in contenders(pair, arguments.drafters, prompts[0]).items():
        rows = results[drafter] = race(pair, options, prompts)
        for column in ("seconds", "cpu_seconds"):
            best = min((name for name in rows if name != "goodput"), key=lambda name: rows[name][column])
            behind = rows["goodput"][column] / rows[best][column] - 1
            shown = "  ".join(f"{name} {row[column]:.4f}" for name, row in rows.items())
            print(f"{drafter:7} {column:11} {shown}   best {best}, behind {behind:+.1%}", flush=True)
        print(f"{drafter:7} steps       " + "  ".join(f"{name} {row['steps']:.0f}" for name, row in rows.items()))
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": device, "batch": arguments.batch, "rows": results}) + "\n")


if __name__ == "__main__":
    main()
