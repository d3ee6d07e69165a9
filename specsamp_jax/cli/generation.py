"""What `specsamp generate` does: models and tokenizer from folders, texts in order, and what was counted."""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specsamp_jax._files import read_json
from specsamp_jax._types import Generation, Model, SamplingParams, Stats
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.models import load_checkpoint, load_generation_config, vocab_size, with_vocab_size
from specsamp_jax.text import CheckpointTokenizer, TextStream, check_vocabularies, load_tokenizer

NGRAM = "ngram"
"""Stands where a drafter's folder would, for drafts from the text's own n-grams."""


class Setup(NamedTuple):
    """What a text is made with.

    Attributes:
      target: The model.
      draft: Who proposes, if anybody.
      tokenizer: Of both.
      sampling: As the target's folder wants it.
      eos_token: The end tokens, possibly none.
      max_length: The longest text that the target was trained on, where its folder says so.
      notes: What is worth knowing about it, in sentences.
    """

    target: Model
    draft: Model | Drafter | None
    tokenizer: CheckpointTokenizer
    sampling: SamplingParams
    eos_token: tuple[int, ...]
    max_length: int | None
    notes: list[str]


def load(
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    *,
    dtype: str | None = None,
    ignore: Collection[str] = (),
) -> Setup:
    """Returns the models in the folders `target` and `draft` with their tokenizer.

    Args:
      target: A checkpoint's folder. None: the trained pair that comes with the package.
      draft: A checkpoint's folder, `NGRAM`, or None for the target alone (with the trained pair: its drafter).
      tokenizer: The folder of the tokenizer of both, where it is not the target's own.
      dtype: What the models compute in. None: the type of their files; with the trained pair, float32.
      ignore: Settings of the target's generation_config.json that are left out.

    Raises:
      ValueError: A folder is missing or broken, or the two do not share a vocabulary.
    """
    if target is None:
        target, tokenizer = ASSETS / "target", ASSETS
        draft, dtype = draft or str(ASSETS / "drafter"), dtype or "float32"
    draft_folder = None if draft in (None, NGRAM) else Path(draft)
    for option, folder in (("--target", target), ("--draft", draft_folder), ("--tokenizer", tokenizer)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{option} must be a folder, but there is no {folder}.")
    notes = []
    # What is small is read first: a mistake is told before gigabytes are.
    text = load_tokenizer(tokenizer or target)
    sampling, eos_token = load_generation_config(target, ignore=ignore)
    if not eos_token and text.eos_token is not None:
        eos_token = (text.eos_token,)
    if draft_folder is not None and tokenizer is None:
        if (draft_folder / "tokenizer.json").exists():
            check_vocabularies(text.tokenizer, load_tokenizer(draft_folder).tokenizer)
        else:
            notes.append(f"{draft_folder} has no tokenizer.json: its tokens are taken to be the target's")
    model = load_checkpoint(target, dtype=dtype)
    max_length = read_json(target / "config.json").get("max_position_embeddings")
    if draft_folder is None:
        if draft is None:
            notes.append("there is no drafter: the target decodes alone")
        drafter = NGramDrafter() if draft == NGRAM else None
        return Setup(model, drafter, text, sampling, eos_token, max_length, notes)
    drafter, size = load_checkpoint(draft_folder, dtype=dtype), vocab_size(model)
    if vocab_size(drafter) != size:
        notes.append(f"the target has {size} logits and the draft {vocab_size(drafter)}: the draft's are made to fit")
    return Setup(model, with_vocab_size(drafter, size), text, sampling, eos_token, max_length, notes)


def pad(prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as one array, with their lengths.

    Raises:
      ValueError: A prompt has a token that a model of `num_tokens` tokens does not know.
    """
    largest = max(map(max, prompts))
    if largest >= num_tokens:
        raise ValueError(f"The tokenizer does not fit the target: it gave token {largest} of {num_tokens}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths


def in_order(
    generations: Iterable[Generation], streams: Sequence[TextStream], lengths: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Yields each row's number with the next piece of its text, all of one row before the next.

    The first row that is not finished is handed out as it grows, and the others wait for it.

    Args:
      generations: What `stream` yields.
      streams: One a row.
      lengths: Tokens of each prompt.
    """
    waiting, lengths, current = [""] * len(streams), list(lengths), 0
    for result in generations:
        tokens, grown = np.asarray(result.tokens), np.asarray(result.lengths).tolist()
        for row, stream in enumerate(streams):
            waiting[row] += stream.push(tokens[row, lengths[row] : grown[row]].tolist())
        # Only a row that is finished gains nothing in a step.
        while current < len(streams) - 1 and grown[current] == lengths[current]:
            yield current, waiting[current] + streams[current].flush()
            current += 1
        yield current, waiting[current]
        waiting[current] = ""
        lengths = grown
    for row in range(current, len(streams)):
        yield row, waiting[row] + streams[row].flush()


class Meter:
    """Passes on what a decoding loop yields, and times it; the first step compiles and is timed apart."""

    def __init__(self, generations: Iterable[Generation]):
        self._generations = generations
        self._began = self._first = self._last = time.perf_counter()
        self._tokens_of_first = 0
        self._stats: Stats | None = None

    def __iter__(self) -> Iterator[Generation]:
        for result in self._generations:
            self._stats, self._last = result.stats, time.perf_counter()
            if int(self._stats.num_steps) == 1:
                self._first, self._tokens_of_first = self._last, int(self._stats.num_emitted.sum())
            yield result

    def summary(self) -> list[str]:
        """What was counted so far, in lines."""
        if self._stats is None:
            return ["nothing was emitted"]
        emitted, steps = int(self._stats.num_emitted.sum()), int(self._stats.num_steps)
        seconds = self._last - self._first
        rate = f"{(emitted - self._tokens_of_first) / seconds:.0f} tokens a second, " if steps > 1 else ""
        lines = [
            f"{emitted} tokens in {steps} steps of the target, {emitted / steps:.2f} a step; "
            f"{rate}after {self._first - self._began:.1f} s for the first step and its compilation"
        ]
        drafted, accepted = np.asarray(self._stats.num_drafted), np.asarray(self._stats.num_accepted)
        if drafted.sum():
            rates = " ".join(f"{rate:.2f}" for rate in accepted_by_position(drafted, accepted))
            counts = f"{drafted.sum()} tokens drafted, {accepted.sum()} accepted"
            lines.append(f"{counts}; by position, where all before were: {rates}")
        return lines


def describe(sampling: SamplingParams, eos_token: Sequence[int]) -> str:
    """How a text is sampled and ended, in one line."""
    fields: dict[str, Any] = sampling._asdict()
    how = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in fields.items())
    how = "greedy" if fields["temperature"] == 0 else how
    return f"{how}; ends at token {' or '.join(map(str, eos_token))}" if eos_token else f"{how}; no end token"
