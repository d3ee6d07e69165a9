"""Speed of `GoodputNumDraft` beside each fixed draft length and the target alone, on the default device.

    python bench/compare_draft_length.py                                     # results/draft_length_cpu.{json,md}
    python bench/compare_draft_length.py --out FILE --cells 1:256 16:128 --drafters good bad n_gram --seconds 40

The package's trained pair in float32, temperature 1, no end token, after 32 tokens of a held-out docstring. A cell
`B:N` is a batch size and the number of new tokens. The "bad" drafter is the "good" one with the entries of each matrix
in random order. `measure_goodput` runs once per cell and drafter, on the first prompt, as `specsamp generate` does.

In a round all contenders continue the same prompts, one after the other; each round begins with another contender. The
texts of the first round count. A contender that took over 1.3 times as long as the fastest after two rounds runs no
more. "Best" is the contender without goodput that took the least time in all rounds; "behind" is the time of goodput
over that of the best, minus 1, with the interval that holds 90 % of 2,000 resamplings of the rounds. The rule's draws
differ from the best's, so one text may take more or fewer steps by chance.
"""

import argparse
import concurrent.futures
import functools
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from decoding import Pair, held_out_prompts, load_pair
from gpu import results

import specsamp_jax as ss
from specsamp_jax.decoding.generate import ALL_STEPS, generate_steps

MOST_ROUNDS, FEWEST_ROUNDS, TOO_SLOW = 24, 3, 1.3
CLOCKS = ("wall", "cpu")


def shuffled(model: ss.Model) -> ss.Model:
    """The model with the entries of each array in random order: its drafts are nearly always rejected."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.permutation(np.ravel(x)).reshape(x.shape)), model.params)
    return ss.Model(params, model.apply_fn, model.init_cache_fn)


def run(max_steps: Any, index: int, prompt: np.ndarray, pair: Pair, num_new: int, options: dict[str, Any]) -> Any:
    """One text of a contender, `options` of `generate`."""
    defaults = {
        "prompt_lengths": None,
        "num_draft": 0,
        "sampling": ss.SamplingParams(),
        "eos_token": None,
        "verify_fn": ss.verify,
        "process_logits_fn": None,
    }
    arguments = defaults | {"target": pair.target, "max_new_tokens": num_new} | options
    return jax.block_until_ready(generate_steps(max_steps, jax.random.key(index), prompt, **arguments))


def contenders(draft: Any, lengths: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """Arguments of `generate` for each contender but goodput."""
    fixed = {str(k): {"draft": draft, "num_draft": k} for k in lengths if k}
    return {"alone": {"draft": None}, **fixed}


def compile_all(run_fn: Any, drafters: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """Compiles the programs of all contenders, several at once; good and bad drafters share theirs."""
    rule = ss.GoodputNumDraft((1.0,) * len(lengths), lengths, prior=(0.5,) * lengths[-1])
    programs = {}
    for name, draft in drafters.items():
        kind = "n_gram" if name == "n_gram" else "model"
        for each, options in (contenders(draft, lengths) | {"goodput": {"draft": draft, "num_draft": rule}}).items():
            programs["alone" if each == "alone" else (kind, each)] = options
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda options: run_fn(np.int32(1), 0, options=options), programs.values()))


def race(run_fn: Any, options: dict[str, dict[str, Any]], seconds: float) -> dict[str, list[tuple[float, float, int]]]:
    """Wall seconds, processor seconds and steps of each round, for the contenders that are not too slow."""
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in options}
    began = time.perf_counter()
    for index in range(MOST_ROUNDS):
        names = [name for name in options if len(rows[name]) == index]
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start, used = time.perf_counter(), time.process_time()
            text = run_fn(ALL_STEPS, index, options=options[name])
            rows[name].append((time.perf_counter() - start, time.process_time() - used, int(text.stats.num_steps)))
        if index == 1:
            totals = {name: np.sum(rows[name], axis=0)[:2] for name in names}
            fastest = np.min(list(totals.values()), axis=0)
            slow = {name for name in names if (totals[name] > TOO_SLOW * fastest).all() and name != "goodput"}
            rows |= {name: [] for name in slow}
            options = {name: value for name, value in options.items() if name not in slow}
        if index + 1 >= FEWEST_ROUNDS and time.perf_counter() - began > seconds:
            break
    return {name: values for name, values in rows.items() if values}


def behind(goodput: np.ndarray, best: np.ndarray) -> tuple[float, float, float]:
    """Time of goodput over that of the best, minus 1, and the interval of 90 % of resampled rounds."""
    rounds = np.random.default_rng(0).integers(0, len(goodput), (2000, len(goodput)))
    ratios = goodput[rounds].sum(1) / best[rounds].sum(1) - 1
    low, high = np.quantile(ratios, [0.05, 0.95])
    return float(goodput.sum() / best.sum() - 1), float(low), float(high)


def summary(rows: dict[str, list[tuple[float, float, int]]], labels: dict[str, Any]) -> dict[str, Any]:
    """One flat row: for each clock the best contender, how far goodput is behind, and mean seconds of each."""
    result = labels | {"rounds": len(rows["goodput"])}
    values = {name: np.array(each) for name, each in rows.items()}
    for column, clock in enumerate(CLOCKS):
        best = min((name for name in values if name != "goodput"), key=lambda name: values[name][:, column].sum())
        ratio, low, high = behind(values["goodput"][:, column], values[best][:, column])
        result |= {f"{clock}_best": best, f"{clock}_behind": ratio, f"{clock}_low": low, f"{clock}_high": high}
        first = values["goodput"][:2, column].sum() / values[best][:2, column].sum() - 1
        result |= {f"{clock}_behind_first_two": float(first)}
        result |= {f"{clock}_seconds": {name: float(each[:, column].mean()) for name, each in values.items()}}
    return result | {"steps": {name: float(each[:, 2].mean()) for name, each in values.items()}}


def lines_of(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The page of the results."""

    def shown(row, clock):
        numbers = (row[f"{clock}_{name}"] for name in ("behind", "low", "high"))
        ratio, low, high = (f"{100 * number:+.1f}" for number in numbers)
        return row[f"{clock}_best"], f"{ratio} ({low} to {high})"

    cells = [
        [
            row["drafter"],
            str(row["batch"]),
            str(row["new_tokens"]),
            str(row["rounds"]),
            *shown(row, "wall"),
            *shown(row, "cpu"),
            " ".join(f"{cost:.2f}" for cost in row["costs"]),
        ]
        for row in rows
    ]
    header = ["drafter", "batch", "tokens", "rounds", "best", "behind, %", "best (CPU)", "behind, % (CPU)", "costs"]
    return [
        "# Draft length",
        "",
        *timing.environment_lines(about),
        "",
        "`GoodputNumDraft` beside fixed draft lengths and the target alone, the trained pair, float32, temperature 1.",
        "Behind: the time of goodput over that of the best other contender, minus 1, with the interval of 90 % of",
        "resampled rounds; wall time, then processor time. Costs: of a step at each of the compiled lengths",
        f"{', '.join(map(str, about['lengths']))}, over that of the first, as measured before the first text.",
        "",
        *results.table(header, cells),
    ]


def main() -> None:
    """Measures each cell, and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["1:256", "16:128"])
    parser.add_argument("--drafters", nargs="+", default=["good", "bad", "n_gram"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=40, help="per cell and drafter, without compilation")
    parser.add_argument("--seconds-at-most", type=float, default=700, help="no cell begins after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "draft_length_cpu")
    arguments = parser.parse_args()
    began, use = time.perf_counter(), timing.Watch()
    lengths = tuple(arguments.lengths)
    pair = load_pair()
    drafters = {"good": pair.drafter, "bad": shuffled(pair.drafter), "n_gram": ss.NGramDrafter()}
    drafters = {name: drafters[name] for name in arguments.drafters}
    rows = []
    for cell in arguments.cells:
        batch_size, num_new = map(int, cell.split(":"))
        prompts = held_out_prompts(MOST_ROUNDS, batch_size)

        def run_fn(max_steps, index, options, prompts=prompts, num_new=num_new):
            return run(max_steps, index, prompts[index], pair, num_new, options)

        compile_all(run_fn, drafters, lengths)
        print(f"batch {batch_size}: compiled after {time.perf_counter() - began:.0f} s", flush=True)
        for name, draft in drafters.items():
            if time.perf_counter() - began > arguments.seconds_at_most:
                print("out of time before", cell, name)
                return
            measure = functools.partial(ss.measure_goodput, target=pair.target, draft=draft, lengths=lengths)
            rule = measure(prompts[0], max_new_tokens=num_new)
            options = contenders(draft, lengths) | {"goodput": {"draft": draft, "num_draft": rule}}
            costs = [cost / rule.costs[0] for cost in rule.costs]
            labels = {"drafter": name, "batch": batch_size, "new_tokens": num_new, "costs": costs, "prior": rule.prior}
            rows.append(summary(race(run_fn, options, arguments.seconds), labels))
            about = timing.environment() | {"others": use.others(), "lengths": lengths}
            timing.write(arguments.out, about, rows, lines_of(about, rows))
            print(f"after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
