"""Parts of `specsamp demo`: a text as it is accepted, a race against the target alone, a chi-square test."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tokenizers import Tokenizer

from specsamp_jax._types import Stats
from specsamp_jax.cli import docstrings, draft_length
from specsamp_jax.cli.pair import Pair
from specsamp_jax.cli.shared import check_target
from specsamp_jax.decoding.costs import measure_goodput
from specsamp_jax.decoding.generate import generate
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.decoding.step import init, step
from specsamp_jax.text import TextStream

NUM_DRAFT = 2  # of the text that is shown and of the check; the race drafts as many as pay
PROMPT_TOKENS, NEW_TOKENS, NUM_PROMPTS, NUM_ROUNDS = 32, 128, 8, 3
NUM_CHECKED, ROWS_AT_ONCE = 8192, 256


class Prompt(NamedTuple):
    """The beginning of a docstring that was not in the training data."""

    name: str
    text: str
    tokens: list[int]


def held_out_prompts(pair: Pair, seed: int) -> list[Prompt]:
    """Returns the first tokens of some held-out docstrings of the installed Python and NumPy."""
    long_enough = []
    for document in docstrings.held_out_docstrings():
        tokens = pair.encode(document.text)
        if len(tokens) >= 2 * PROMPT_TOKENS:
            beginning = tokens[:PROMPT_TOKENS]
            long_enough.append(Prompt(document.name, pair.tokenizer.decode(beginning), beginning))
    chosen = np.random.default_rng(seed).permutation(len(long_enough))[:NUM_PROMPTS]
    return [long_enough[i] for i in chosen]


def continuation(pair: Pair, tokens: Sequence[int], key: jax.Array) -> Iterator[tuple[str, str]]:
    """Yields pieces of text as they are emitted, each with its origin: accepted, residual or bonus."""
    state = init(
        jnp.asarray([tokens]),
        target=pair.target,
        draft=pair.drafter,
        num_draft=NUM_DRAFT,
        max_new_tokens=NEW_TOKENS,
    )

    @jax.jit
    def advance(state, target, draft):
        return step(key, state, target=target, draft=draft, num_draft=NUM_DRAFT, eos_token=pair.end_token)

    stream, kind = TextStream(pair.tokenizer, tokens), "bonus"
    while not bool(state.finished[0]):
        state, info = advance(state, pair.target, pair.drafter)
        last = "bonus" if info.num_accepted[0] == info.num_drafted[0] else "residual"
        for i, token in enumerate(info.tokens[0, : int(info.num_tokens[0])].tolist()):
            kind = "accepted" if i < info.num_accepted[0] else last
            # A token may be part of a character: the stream returns whole characters.
            if text := stream.push([token]):
                yield text, kind
    if text := stream.flush():
        yield text, kind


class Run(NamedTuple):
    """Measurements of one way of decoding, over all prompts; `share_drafted` is the share of steps with drafts.

    `num_drafted` and `acceptance` are by draft position.
    """

    name: str
    tokens_per_second: float
    tokens_per_step: float
    num_drafted: list[int]
    acceptance: list[float]
    share_drafted: float


class Race(NamedTuple):
    """Both ways of decoding; `gain` is the median, over texts, of the target's time alone over that with speculation.

    The two times of a text follow one another: a machine that is slower for a while is so for both.
    """

    speculative: Run
    alone: Run
    gain: float


def measure_rule(pair: Pair, prompt: Prompt) -> GoodputNumDraft:
    """Measures a step at each of `draft_length.LENGTHS`, in the program that `race` runs."""
    return measure_goodput(
        np.asarray([prompt.tokens]),
        target=pair.target,
        draft=pair.drafter,
        lengths=draft_length.LENGTHS,
        max_new_tokens=NEW_TOKENS,
    )


def race(pair: Pair, prompts: Sequence[Prompt], rule: GoodputNumDraft, seed: int) -> Race:
    """Continues each prompt with speculation and with the target alone, in turns, and measures both.

    All texts have `NEW_TOKENS` tokens: no end token ends them.
    """
    runners = {
        "with speculation": functools.partial(generate, draft=pair.drafter, num_draft=rule),
        "target alone": functools.partial(generate, draft=None),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    stats: dict[str, list[Stats]] = {name: [] for name in runners}

    def run(name: str, prompt: Prompt, index: int) -> Stats:
        key, tokens = jax.random.key(seed + index), np.asarray([prompt.tokens])
        return jax.device_get(runners[name](key, tokens, target=pair.target, max_new_tokens=NEW_TOKENS).stats)

    for name in runners:
        run(name, prompts[0], 0)
    for index in range(NUM_ROUNDS * len(prompts)):
        for name in runners:
            began = time.perf_counter()
            stats[name].append(run(name, prompts[index % len(prompts)], index))
            seconds[name].append(time.perf_counter() - began)
    speculative, alone = (_summary(name, seconds[name], stats[name]) for name in runners)
    ratios = np.divide(seconds["target alone"], seconds["with speculation"])
    return Race(speculative, alone, float(np.median(ratios)))


def _summary(name: str, seconds: Sequence[float], stats: Sequence[Stats]) -> Run:
    """The counts, and the median over texts of the tokens per second: other work disturbs it less than the mean."""
    for each in stats:
        check_target(each)
    emitted = sum(int(s.num_emitted.sum()) for s in stats)
    drafted = np.sum([s.num_drafted for s in stats], axis=0)
    accepted = np.sum([s.num_accepted for s in stats], axis=0)
    tokens_per_step = emitted / sum(int(s.num_steps) for s in stats)
    share_drafted = float(drafted[0]) / sum(int(s.num_steps) for s in stats) if len(drafted) else 0.0
    rates = [int(s.num_emitted.sum()) / spent for s, spent in zip(stats, seconds, strict=True)]
    acceptance = accepted_by_position(drafted, accepted)
    return Run(name, float(np.median(rates)), tokens_per_step, drafted.tolist(), acceptance, share_drafted)


class Check(NamedTuple):
    """Counts of the first token emitted after one context, and the counts expected from the target."""

    counts: np.ndarray
    expected: np.ndarray
    statistic: float
    degrees: int
    p_value: float

    @property
    def num_samples(self) -> int:
        """Returns the number of tokens counted."""
        return int(self.counts.sum())

    def rows(self, tokenizer: Tokenizer) -> Iterator[tuple[str, str, str]]:
        """Yields the most probable tokens with their counts and expected counts, then all others together."""
        top = np.argsort(-self.expected)[:6]
        for token in top:
            yield repr(tokenizer.decode([int(token)])), f"{self.counts[token]:,}", f"{self.expected[token]:,.1f}"
        others = self.num_samples - self.counts[top].sum(), self.num_samples - self.expected[top].sum()
        yield "all others", f"{others[0]:,}", f"{others[1]:,.1f}"


def check_exactness(pair: Pair, tokens: Sequence[int], seed: int) -> Check:
    """Tests the first token of many speculative steps after one context with Pearson's chi-square.

    The expected counts are a softmax in float64 of the target's logits, which uses none of the sampling code.
    Tokens expected fewer than five times are merged into one cell.
    """
    prompt = jnp.broadcast_to(jnp.asarray(tokens), (ROWS_AT_ONCE, len(tokens)))

    @jax.jit
    def first_tokens(keys, target, draft):
        state = init(prompt, target=target, draft=draft, num_draft=NUM_DRAFT, max_new_tokens=NUM_DRAFT + 1)
        return lax.map(
            lambda key: step(key, state, target=target, draft=draft, num_draft=NUM_DRAFT)[1].tokens[:, 0], keys
        )

    @jax.jit
    def next_logits(model):
        positions = jnp.arange(len(tokens))[None]
        return model.apply_fn(model.params, prompt[:1], positions, model.init_cache_fn(1, len(tokens)))[0][0, -1]

    keys = jax.random.split(jax.random.key(seed), NUM_CHECKED // ROWS_AT_ONCE)
    logits = np.asarray(next_logits(pair.target), np.float64)
    probs = np.exp(logits - logits.max())
    counts = np.bincount(np.ravel(first_tokens(keys, pair.target, pair.drafter)), minlength=len(probs))
    expected = probs / probs.sum() * counts.sum()
    rare = expected < 5
    observed, expectation = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    statistic, degrees = float(((observed - expectation) ** 2 / expectation).sum()), len(expectation) - 1
    p_value = float(jax.scipy.special.gammaincc(degrees / 2, statistic / 2))
    return Check(counts, expected, statistic, degrees, p_value)
