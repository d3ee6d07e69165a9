"""Generates the texts of one setting, and counts calls, drafts and seconds."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from methods import VERIFY_FNS
from settings import ALONE, NUM_DRAFT, Setting
from tasks import Task, with_dtype

import specsamp_jax as ss
from specsamp_jax.decoding.generate import ALL_STEPS, generate_steps


class Counts(NamedTuple):
    """Sums over all texts.

    Attributes:
      calls: Sampling calls, each for a whole batch.
      row_calls: Sampling calls, each for one text.
      drafted: Drafts verified at each position.
      accepted: Drafts accepted at each position.
      seconds: The host's clock, from the prompts to the tokens.
      calibration: Of a calibrated rule: drafts that an estimate decided, sums over them of the bound and of the
        estimate's error in nats, and the largest bound. Empty for others.
    """

    calls: int
    row_calls: int
    drafted: list[int]
    accepted: list[int]
    seconds: float
    calibration: dict[str, float]


def _generate(max_steps: np.int32, setting: Setting, task: Task, index: np.ndarray) -> ss.Generation:
    target, draft = (with_dtype(model, setting.dtype) for model in task.models_fn(index))
    drafter: Any = ss.NGramDrafter() if setting.drafter == "n-grams" else draft
    if setting.method in ALONE:
        target, drafter = (target if setting.method == "target alone" else draft), None
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(setting.seed), index)
    # The temperature is data; a filter that is off is not in the program.
    sampling = ss.SamplingParams(setting.temperature, setting.top_k, setting.top_p)
    return generate_steps(
        max_steps,
        keys,
        task.prompts[index],
        target=target,
        draft=drafter,
        num_draft=NUM_DRAFT[setting.num_draft],
        max_new_tokens=task.max_new_tokens,
        prompt_lengths=task.lengths[index],
        sampling=sampling,
        eos_token=task.end_tokens,
        verify_fn=VERIFY_FNS.get(setting.method, ss.verify),
        process_logits_fn=task.processor,
    )


def program(setting: Setting) -> tuple[Any, ...]:
    """Identifies the program of a setting: temperature, seed and the numbers of a filter that is on are data."""
    filters = {"top_k": min(setting.top_k, 1), "top_p": 1.0 if setting.top_p == 1 else 0.0}
    return setting._replace(temperature=0.0, seed=0, **filters)


def warm_up(setting: Setting, task: Task) -> None:
    """Compiles the program of a setting and runs it once: a GPU may compile kernels when they are first launched."""
    jax.block_until_ready(_generate(ALL_STEPS, setting, task, np.arange(setting.batch_size)))


def run(setting: Setting, task: Task, num_texts: int) -> tuple[list[str], list[int], Counts]:
    """Returns the texts, the number of tokens of each, and the counts; the program is compiled by `warm_up`."""
    texts, num_tokens, results = [], [], []
    start = time.perf_counter()
    for first in range(0, num_texts, setting.batch_size):
        index = np.arange(first, first + setting.batch_size)
        results.append(jax.device_get(_generate(ALL_STEPS, setting, task, index)))
    seconds = time.perf_counter() - start
    for i, result in enumerate(results):
        for row, (tokens, length) in enumerate(zip(result.tokens, result.lengths, strict=True)):
            begin = task.lengths[i * setting.batch_size + row]
            new = tokens[begin:length]
            num_tokens.append(len(new))
            texts.append(task.decode(new[~np.isin(new, task.end_tokens)].tolist()))
    drafted = _list(np.sum([result.stats.num_drafted for result in results], axis=0))
    accepted = _list(np.sum([result.stats.num_accepted for result in results], axis=0))
    calls = sum(int(result.stats.num_steps) for result in results)
    if setting.method in ALONE:
        row_calls = sum(num_tokens)
    elif setting.drafter == "n-grams":
        # A step may draft nothing, so that drafts do not count steps; each emits one token beside its accepted drafts,
        # but for the last of a text that ends with an accepted draft.
        row_calls = sum(num_tokens) - sum(accepted)
    else:
        row_calls = drafted[0]
    states = [result.verify_state for result in results if isinstance(result.verify_state, ss.Calibration)]
    names = ("num_decided", "sum_bound", "sum_error") if states else ()
    calibration = {name: float(sum(state._asdict()[name].sum() for state in states)) for name in names}
    if states:
        calibration["max_bound"] = float(max(state.max_bound.max() for state in states))
    return texts, num_tokens, Counts(calls, row_calls, drafted, accepted, seconds, calibration)


def _list(values: Any) -> list[int]:
    return [int(value) for value in np.ravel(values)]
