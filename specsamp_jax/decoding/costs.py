"""Measures time and acceptance of a decoding step at each draft length, on the machine and with the models at hand."""

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from specsamp_jax import _checks, _resident
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import Model, SamplingParams, Stats
from specsamp_jax.decoding.drafters import Drafter, ProcessLogitsFn
from specsamp_jax.decoding.generate import generate, generate_steps, stream
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.stateful_rule import VerifyFn
from specsamp_jax.rules.verify import verify

_FEWEST_STEPS, _MOST_STEPS, _STEPS_SECONDS = 3, 32, 0.1  # steps per timing: as many as take these seconds
_FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 3, 16, 3.0  # rounds of all lengths; no new one after these seconds
_MOST_TEXTS, _TEXT_SECONDS = 8, 1.0  # whole texts with the longest drafts, which measure the acceptance
_ENOUGH_STEPS = 64  # steps of these texts; if they have fewer, the steps of the rounds count too


@allow_rank_promotion
def measure_goodput(
    prompt: Int[Array | np.ndarray, "B P"],
    *,
    target: Model,
    draft: Model | Drafter,
    lengths: tuple[int, ...] = GoodputNumDraft.lengths,
    decode_fn: Callable[..., Any] = generate,
    max_new_tokens: int,
    prompt_lengths: Int[Array | np.ndarray, "B"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> GoodputNumDraft:
    """Returns a `GoodputNumDraft` with the seconds of a step at each of `lengths`, and the acceptance at each position.

    Decodes a few steps after the prompts with each length in turn, then whole texts with the longest, for about four
    seconds and the time of compilation, and throws the texts away. `costs` are shares of the time of a round of all
    lengths, medians of the rounds: a machine that is slower for a while is so for all lengths of a round. A longer
    draft never costs less than a shorter one. `prior` is the share of drafts that were accepted at each position after
    those before it, of all steps of the whole texts that reached it: n-grams are found more often in a longer text.
    `change_cost` is the time by which the first step of a call takes longer than later ones; 0 with `stream`. The
    programs that run are those of `decode_fn` with the same arguments and the rule that is returned, which are then
    compiled already. The time of a step depends on B and on P + `max_new_tokens`: measure again for shapes that differ
    much.

    Args:
      prompt: As in `generate`, and so are the arguments that are not listed here.
      target: The target.
      draft: The drafter.
      lengths: The draft lengths, ascending.
      decode_fn: `generate` or `stream`: a step of `stream` includes the time of a call from Python.
      max_new_tokens: As in `generate`.
      prompt_lengths: As in `generate`.
      sampling: As in `generate`.
      eos_token: Not used, so that texts do not end early. `generate` has one program for any few end tokens.
      verify_fn: As in `generate`.
      process_logits_fn: As in `generate`.

    Raises:
      ValueError: As in `generate`, or the lengths are not ascending, or `decode_fn` is another function.

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> target = ss.Model(jnp.eye(5), bigrams, lambda batch_size, max_length: ())
      >>> models = {"target": target, "draft": ss.NGramDrafter()}
      >>> rule = ss.measure_goodput(jnp.array([[1, 2]]), **models, lengths=(0, 2), max_new_tokens=8)
      >>> len(rule.costs), len(rule.prior)
      (2, 2)
    """
    _checks.lengths("lengths", lengths, 0)
    if decode_fn not in (generate, stream):
        raise ValueError(f"decode_fn must be generate or stream; got {decode_fn!r}.")
    options = {
        "target": target,
        "draft": draft,
        "max_new_tokens": max_new_tokens,
        "prompt_lengths": prompt_lengths,
        "sampling": sampling,
        # A text that ends after a few steps says little of their time. The program is the same.
        "eos_token": None,
        "verify_fn": verify_fn,
        "process_logits_fn": process_logits_fn,
    }
    seconds_fn = _seconds_of_generate if decode_fn is generate else _seconds_of_stream
    rules = [forced(lengths, index) for index in range(len(lengths))]
    first = functools.partial(seconds_fn, _FEWEST_STEPS, jax.random.key(0), prompt, rules[0], options)
    first()  # compiles
    num_steps = int(np.clip(_STEPS_SECONDS / max(first()[0], 1e-9), _FEWEST_STEPS, _MOST_STEPS))
    began, rounds, beginnings, counts = time.perf_counter(), [], [], []
    while len(rounds) < _FEWEST_ROUNDS or (len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _SECONDS):
        key = jax.random.key(len(rounds))
        timed = []
        for rule in rules:
            timed.append(seconds_fn(num_steps, key, prompt, rule, options))
            if not rounds:
                # The first products of a length leave up to 40 MB of freed memory to each thread of XLA.
                _resident.trim()
        seconds, beginning, stats = zip(*timed, strict=True)
        rounds.append(seconds)
        beginnings += [each for each in beginning if each is not None]
        counts += zip(lengths, jax.device_get(stats), strict=True)
    costs = _costs(rounds)
    texts = _texts(int(_TEXT_SECONDS / costs[-1]), prompt, rules[-1], options, decode_fn)
    if sum(int(stats.num_steps) for _, stats in texts) < _ENOUGH_STEPS:
        texts += counts
    prior = _acceptance(texts, lengths[-1])
    change_cost = max(float(np.median(beginnings)), 0.0) if beginnings else 0.0
    return GoodputNumDraft(costs, lengths, prior=prior, change_cost=change_cost)


def _texts(
    most_steps: int, prompt: Any, rule: GoodputNumDraft, options: dict[str, Any], decode_fn: Callable[..., Any]
) -> list[tuple[int, Stats]]:
    """The longest draft length, and the counts, of several texts of at most so many steps in all."""
    counts = []
    while most_steps > 0 and len(counts) < _MOST_TEXTS:
        key = jax.random.key(len(counts))
        if decode_fn is generate:
            stats = generate_steps(np.int32(most_steps), key, prompt, num_draft=rule, **options).stats
        else:
            stats: Any = None  # replaced: a text has a step or more
            for text in itertools.islice(stream(key, prompt, num_draft=rule, **options), most_steps):
                stats = text.stats
        counts.append((rule.lengths[-1], jax.device_get(stats)))
        most_steps -= max(int(counts[-1][1].num_steps), 1)
    return counts


def _costs(rounds: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Time of a step at each length, from times in several rounds; ascending, and positive whatever the noise."""
    times = np.maximum(rounds, 1e-9)
    totals = times.sum(axis=1)
    costs = np.median(times / totals[:, None], axis=0) * np.median(totals)
    return tuple(np.maximum.accumulate(costs).tolist())


def _acceptance(counts: list[tuple[int, Stats]], longest: int) -> tuple[float, ...]:
    """Acceptance at each position, given those before it; half an observation of .5 where none was made.

    A step of a row reaches the first position if it asks for a draft, and another one if it accepted the draft before.
    """
    reached, accepted = np.zeros(longest), np.zeros(longest)
    for length, stats in counts:
        if length:
            # A step of a row emits a token more than it accepts, unless a limit cuts it short. Not all steps propose.
            num_steps = max(stats.num_emitted.sum() - stats.num_accepted.sum(), stats.num_drafted[0])
            reached[:length] += [num_steps, *stats.num_accepted[: length - 1]]
            accepted += stats.num_accepted
    return tuple(((accepted + 0.25) / (reached + 0.5)).clip(0, 1).tolist())


def forced(lengths: tuple[int, ...], index: int) -> GoodputNumDraft:
    """The rule under costs with which it always chooses one length, in the program of any measured rule."""
    costs = tuple(1.0 if i == index else 1e9 for i in range(len(lengths)))
    return GoodputNumDraft(costs, lengths, prior=(0.5,) * lengths[-1])


def _seconds_of_generate(
    most_steps: int, key: Any, prompt: Any, rule: GoodputNumDraft, options: dict[str, Any]
) -> tuple[float, float | None, Stats]:
    """Seconds of a step in the compiled loop, those by which a call's first step is longer, counts of the longest call.

    On a GPU the first step of a length takes longer in each call, because XLA updates the length's CUDA graph. None if
    the text ends with the first step.
    """
    times, texts = [], []
    # The first call is not counted: it brings the models into the processor's caches after another rule's call.
    for max_steps in (1, 0, 1, 1 + most_steps):
        began = time.perf_counter()
        text = jax.block_until_ready(generate_steps(np.int32(max_steps), key, prompt, num_draft=rule, **options))
        times.append(time.perf_counter() - began)
        texts.append(text)
    _, none, first, all_steps = times
    num_steps = int(texts[-1].stats.num_steps)
    if num_steps <= 1:
        return all_steps - none, None, texts[-1].stats
    seconds = (all_steps - first) / (num_steps - 1)
    return seconds, first - none - seconds, texts[-1].stats


def _seconds_of_stream(
    most_steps: int, key: Any, prompt: Any, rule: GoodputNumDraft, options: dict[str, Any]
) -> tuple[float, float | None, Stats]:
    """Seconds of a step from one item of the stream to the next, without the first; None; the counts of all steps."""
    ends: list[float] = []
    # Not `Stats.zeros`: it would compile programs, and XLA's compiler alone takes 60 MB.
    stats: Any = None
    for text in itertools.islice(stream(key, prompt, num_draft=rule, **options), most_steps + 1):
        stats = jax.block_until_ready(text).stats
        ends.append(time.perf_counter())
    return (ends[-1] - ends[0]) / max(len(ends) - 1, 1), None, stats
