"""Speed of `GoodputNumDraft` beside each fixed draft length and the target alone, on the default device.

    python bench/compare_draft_length.py                                     # results/draft_length_cpu.{json,md}
    python bench/compare_draft_length.py --out FILE --cells 1:256 16:128 --drafters good bad n_gram --seconds 40

The package's trained pair in float32, temperature 1, no end token, after 32 tokens of a held-out docstring. A cell
`B:N` is a batch size and the number of new tokens. The "bad" drafter is the "good" one with the entries of each matrix
in random order. `measure_goodput` runs before every eighth round, on that round's prompt, as `specsamp generate` does.
Rows of other cells and drafters that FILE has already are kept, so a table can be made in pieces. `--merge` writes a
table of pieces that were measured at the same time, on several GPUs:

    python bench/compare_draft_length.py --out FILE --merge PIECE.json ...

In a round all contenders continue the same prompts in random order. The texts of the first round count. The target
alone runs twice, under two names: the difference of its two times is that of the measurement. A contender that took
over 1.3 times as long as the fastest after two rounds runs no more.

"Best" is the contender without goodput that took the least time in the other half of the rounds (odd or even), since
the least of several noisy numbers in the same rounds would be too small. "Behind" is the median of goodput's time over
that of the best in the same round, minus 1, with the interval that holds 90 % of 2,000 resamplings of the rounds. The
rule's draws differ from the best's, so one text may take more or fewer steps by chance.
"""

import argparse
import concurrent.futures
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
from decoding import Pair, held_out_prompts, load_pair
from gpu import results

import specsamp_jax as ss
from specsamp_jax.decoding.generate import ALL_STEPS, generate_steps

MOST_ROUNDS, FEWEST_ROUNDS, TOO_SLOW = 240, 3, 1.3
ROUNDS_PER_MEASUREMENT = 8
ALONE, AGAIN, GOODPUT = "alone", "alone again", "goodput"


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
    return {ALONE: {"draft": None}, AGAIN: {"draft": None}, **fixed}


def compile_all(run_fn: Any, drafters: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """Compiles the programs of all contenders, several at once; good and bad drafters share theirs."""
    rule = ss.GoodputNumDraft((1.0,) * len(lengths), lengths, prior=(0.5,) * lengths[-1])
    programs = {}
    for name, draft in drafters.items():
        kind = "n_gram" if name == "n_gram" else "model"
        for each, options in (contenders(draft, lengths) | {GOODPUT: {"draft": draft, "num_draft": rule}}).items():
            programs[ALONE if options["draft"] is None else (kind, each)] = options
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda options: run_fn(np.int32(1), 0, options=options), programs.values()))


class Race(NamedTuple):
    """Results of some rounds.

    Attributes:
      seconds: Of each round, for the contenders that are not too slow.
      steps: Like `seconds`.
      rules: Those that `measure_goodput` returned.
    """

    seconds: dict[str, list[float]]
    steps: dict[str, list[int]]
    rules: list[ss.GoodputNumDraft]


def race(run_fn: Any, measure_fn: Any, options: dict[str, dict[str, Any]], draft: Any, seconds: float) -> Race:
    """Runs rounds for so many seconds; those of `measure_fn` do not count."""
    names, rules, spent = [*options, GOODPUT], [], 0.0
    times: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, list[int]] = {name: [] for name in names}
    for index in range(MOST_ROUNDS):
        if index % ROUNDS_PER_MEASUREMENT == 0:
            rules.append(measure_fn(index))
            options = options | {GOODPUT: {"draft": draft, "num_draft": rules[-1]}}
        for name in np.random.default_rng(index).permutation(names):
            start = time.perf_counter()
            text = run_fn(ALL_STEPS, index, options=options[name])
            times[name].append(time.perf_counter() - start)
            steps[name].append(int(text.stats.num_steps))
            spent += times[name][-1]
        if index == 1:
            fastest = min(sum(each) for each in times.values())
            names = [n for n in names if sum(times[n]) <= TOO_SLOW * fastest or n in (ALONE, AGAIN, GOODPUT)]
        if index + 1 >= FEWEST_ROUNDS and spent > seconds:
            break
    return Race({name: times[name] for name in names}, {name: steps[name] for name in names}, rules)


def best_of_the_others(times: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    """The best contender without goodput and its times; each half of the rounds has the best of the other half."""
    candidates = [name for name in times if name not in (AGAIN, GOODPUT)]
    odd = np.arange(len(times[GOODPUT])) % 2 == 1
    chosen = [min(candidates, key=lambda name, half=half: times[name][half].mean()) for half in (odd, ~odd)]
    return "/".join(dict.fromkeys(chosen)), np.where(odd, times[chosen[1]], times[chosen[0]])


def behind(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float, float]:
    """Median of the rounds' ratios, minus 1, and the interval of 90 % of resampled rounds."""
    ratios = ours / theirs - 1
    rounds = np.random.default_rng(0).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.quantile(np.median(ratios[rounds], axis=1), [0.05, 0.95])
    return float(np.median(ratios)), float(low), float(high)


def summary(result: Race, labels: dict[str, Any]) -> dict[str, Any]:
    """One flat row: the best contender, how far goodput is behind it, and medians of each contender."""
    times = {name: np.array(each) for name, each in result.seconds.items()}
    best, theirs = best_of_the_others(times)
    row = labels | {"rounds": len(theirs), "best": best}
    for name, pair in (("behind", (times[GOODPUT], theirs)), ("same", (times[AGAIN], times[ALONE]))):
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), behind(*pair), strict=True))
    row |= {"behind_of_means": float(times[GOODPUT].mean() / theirs.mean() - 1)}
    costs = np.array([rule.costs for rule in result.rules])
    row |= {"costs": np.median(costs / costs[:, :1], axis=0).tolist()}
    row |= {"prior": np.median([rule.prior for rule in result.rules], axis=0).tolist()}
    row |= {"seconds": {name: float(np.median(each)) for name, each in times.items()}}
    return row | {"steps": {name: float(np.mean(each)) for name, each in result.steps.items()}}


def lines_of(about: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """The page of the results."""

    def shown(row, name):
        number, low, high = (f"{100 * row[key]:+.1f}" for key in (name, f"{name}_low", f"{name}_high"))
        return f"{number} ({low} to {high})"

    cells = [
        [
            row["drafter"],
            str(row["batch"]),
            str(row["new_tokens"]),
            str(row["rounds"]),
            row["best"],
            shown(row, "behind"),
            f"{100 * row['behind_of_means']:+.1f}",
            shown(row, "same"),
            " ".join(f"{cost:.2f}" for cost in row["costs"]),
        ]
        for row in rows
    ]
    header = ["drafter", "batch", "tokens", "rounds", "best", "behind, %", "of means", "noise, %", "costs"]
    return [
        "# Draft length",
        "",
        *timing.environment_lines(about),
        "",
        "`GoodputNumDraft` beside fixed draft lengths and the target alone, the trained pair, float32, temperature 1.",
        "Behind: the time of goodput over that of the best other contender, minus 1, median of the rounds, with the",
        "interval of 90 % of resampled rounds; then that of the mean times. Noise: the target alone over itself.",
        f"Costs: of a step at each of the compiled lengths {', '.join(map(str, about['lengths']))}, over that of the",
        "first, as measured before every eighth round.",
        "",
        *results.table(header, cells),
    ]


def kept(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those of the result file that they do not replace, in the order of the file."""
    file = out.with_suffix(".json")
    before = results.read(file)[1] if file.exists() else []
    merged = {tuple(row[name] for name in ("batch", "new_tokens", "drafter")): row for row in [*before, *rows]}
    return list(merged.values())


def write(out: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Writes rows, with those of the result file that they do not replace."""
    merged = kept(out, rows)
    about = about | {"others": max(row["others"] for row in merged)}
    timing.write(out, about, merged, lines_of(about, merged))


def merge(out: Path, pieces: list[Path]) -> None:
    """Writes the rows of the pieces that exist, with the environment of the first."""
    tables = [results.read(piece) for piece in pieces if piece.exists()]
    if not tables:
        raise SystemExit(f"--merge: none of {', '.join(map(str, pieces))} exists.")
    rows = [row for _, each in tables for row in each]
    write(out, tables[0][0], sorted(rows, key=lambda row: row["batch"]))


def main() -> None:
    """Measures each cell, and writes the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["1:256", "16:128"])
    parser.add_argument("--drafters", nargs="+", default=["good", "bad", "n_gram"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[0, 1, 2, 4, 8])
    parser.add_argument("--seconds", type=float, default=40, help="per cell and drafter, without compilation")
    parser.add_argument("--seconds-at-most", type=float, default=700, help="no cell begins after so many seconds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "draft_length_cpu")
    parser.add_argument("--merge", nargs="+", type=Path, help="results of this script; measures nothing")
    arguments = parser.parse_args()
    if arguments.merge:
        merge(arguments.out, arguments.merge)
        return
    began = time.perf_counter()
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

            def measure_fn(index, draft=draft, prompts=prompts, num_new=num_new):
                options = {"target": pair.target, "draft": draft, "lengths": lengths, "max_new_tokens": num_new}
                return ss.measure_goodput(prompts[index], **options)

            use = timing.Watch()
            result = race(run_fn, measure_fn, contenders(draft, lengths), draft, arguments.seconds)
            labels = {"drafter": name, "batch": batch_size, "new_tokens": num_new, "others": use.others()}
            rows.append(summary(result, labels))
            write(arguments.out, timing.environment() | {"lengths": lengths}, rows)
            print(f"after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
