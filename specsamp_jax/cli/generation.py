"""Parts of `specsamp generate`: loads models and tokenizer, orders the texts of a batch, and counts tokens."""

import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from specsamp_jax._files import decode, read_json, read_setting, whole_number
from specsamp_jax._types import Generation, Model, Stats
from specsamp_jax.cli.folders import NGRAM, check_kind, check_option, draft_folder
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.cli.shared import acceptance_line, check_target, warn_about_draft
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter
from specsamp_jax.models import (
    GenerationConfig,
    load_checkpoint,
    load_generation_config,
    vocab_size,
    with_vocab_size,
)
from specsamp_jax.text import CheckpointTokenizer, TextStream, check_vocabularies, load_tokenizer

_MAX_PROMPT_BYTES = 1 << 26


class Setup(NamedTuple):
    """Models, tokenizer and settings of a generation.

    Attributes:
      target: The target.
      draft: The drafter, if there is one.
      tokenizer: The tokenizer of both.
      config: The settings in the target's folder; its end tokens are the tokenizer's if the folder states none.
      max_length: The longest text that the target was trained on, if its config.json states it.
      num_heads: The attention heads of each model.
      notes: Messages about the models, in sentences.
    """

    target: Model
    draft: Model | Drafter | None
    tokenizer: CheckpointTokenizer
    config: GenerationConfig
    max_length: int | None
    num_heads: tuple[int, ...]
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
      tokenizer: The folder of the tokenizer of both. None: the target's.
      dtype: The dtype of the computation. None: the dtype of the files; with the trained pair, float32.
      ignore: Settings of the target's generation_config.json to leave out.

    Raises:
      ValueError: A folder is missing or broken, or the two models do not share a vocabulary.
    """
    if target is None:
        target, tokenizer = ASSETS / "target", ASSETS
        draft, dtype = draft or str(ASSETS / "drafter"), dtype or "float32"
    check_option("--target", target)
    check_option("--tokenizer", tokenizer)
    drafter_folder = draft_folder(draft)
    check_kind("--target", target, speech=False)
    check_kind("--draft", drafter_folder, speech=False)
    notes = []
    # Small files are read first, so that mistakes are found before gigabytes are read.
    text = load_tokenizer(tokenizer or target)
    config = load_generation_config(target, ignore=ignore)
    if not config.eos_token and text.eos_token is not None:
        config = config._replace(eos_token=(text.eos_token,))
    if drafter_folder is not None and tokenizer is None:
        if (drafter_folder / "tokenizer.json").exists():
            check_vocabularies(text.tokenizer, load_tokenizer(drafter_folder).tokenizer)
        else:
            notes.append(f"{drafter_folder} has no tokenizer.json: its tokens are assumed to be the target's")
    model = load_checkpoint(target, dtype=dtype)
    max_length, num_heads = _read_sizes(target / "config.json")
    if drafter_folder is None:
        if draft is None:
            notes.append("there is no drafter: the target decodes alone")
        drafter = NGramDrafter() if draft == NGRAM else None
        return Setup(model, drafter, text, config, max_length, (num_heads,), notes)
    drafter, size = load_checkpoint(drafter_folder, dtype=dtype), vocab_size(model)
    if vocab_size(drafter) != size:
        notes.append(f"the target has {size} logits and the draft {vocab_size(drafter)}: the draft's are made to fit")
    heads = (num_heads, _read_sizes(drafter_folder / "config.json")[1])
    return Setup(model, with_vocab_size(drafter, size), text, config, max_length, heads, notes)


def _read_sizes(file: Path) -> tuple[int | None, int]:
    """The longest text and the attention heads of a model whose config.json was accepted."""
    config = read_json(file)
    max_length = read_setting(config, "max_position_embeddings", whole_number(1), source=file)
    return max_length, read_setting(config, "num_attention_heads", whole_number(1), source=file)


def read_prompt(file: Path) -> str:
    """Returns the text of a prompt file, which may be a pipe; `-` is standard input.

    Raises:
      ValueError: The file cannot be read, is too large for a prompt, or is not text in UTF-8.
    """
    name = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) != "-":
            with file.open("rb") as opened:
                content = opened.read(_MAX_PROMPT_BYTES + 1)
        elif sys.stdin is None:
            raise ValueError("--prompt-file - needs standard input, which is closed.")
        else:
            content = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise ValueError(f"--prompt-file {name!r}: {error.strerror}.") from error
    if len(content) > _MAX_PROMPT_BYTES:
        raise ValueError(f"--prompt-file {name!r} must have at most {_MAX_PROMPT_BYTES:,} bytes, and has more.")
    return decode(content, f"--prompt-file {name!r}")


def pad(prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as one array, padded with token 0, and their lengths.

    Raises:
      ValueError: A prompt has a token outside the model's vocabulary of `num_tokens`.
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
    """Yields the index of a row with the next piece of its text, all pieces of a row before the next row.

    The first unfinished row is yielded as it grows, and the pieces of later rows wait.

    Args:
      generations: The items of `stream`.
      streams: One per row.
      lengths: Tokens of each prompt.
    """
    waiting, lengths, current = [""] * len(streams), list(lengths), 0
    for result in generations:
        tokens, grown = np.asarray(result.tokens), np.asarray(result.lengths).tolist()
        for row, stream in enumerate(streams):
            waiting[row] += stream.push(tokens[row, lengths[row] : grown[row]].tolist())
        # A row that gains nothing in a step is finished.
        while current < len(streams) - 1 and grown[current] == lengths[current]:
            yield current, waiting[current] + streams[current].flush()
            current += 1
        yield current, waiting[current]
        waiting[current] = ""
        lengths = grown
    for row in range(current, len(streams)):
        yield row, waiting[row] + streams[row].flush()


class Meter:
    """Iterates over a decoding loop and times it; the first step compiles and is timed separately.

    Raises:
      ClickException: The target gave a degenerate row.
    """

    def __init__(self, generations: Iterable[Generation]):
        self._generations = generations
        self._began = self._first = self._last = time.perf_counter()
        self._tokens_of_first = 0
        self._stats: Stats | None = None

    def __iter__(self) -> Iterator[Generation]:
        for result in self._generations:
            self._stats, self._last = result.stats, time.perf_counter()
            check_target(self._stats)
            if int(self._stats.num_steps) == 1:
                self._first, self._tokens_of_first = self._last, int(self._stats.num_emitted.sum())
            yield result

    def summary(self) -> list[str]:
        """Returns the counts so far, in lines."""
        if self._stats is None:
            return ["nothing was emitted"]
        emitted, steps = int(self._stats.num_emitted.sum()), int(self._stats.num_steps)
        seconds = self._last - self._first
        rate = f"{(emitted - self._tokens_of_first) / seconds:.0f} tokens per second, " if steps > 1 else ""
        warn_about_draft(self._stats)
        acceptance = acceptance_line(self._stats)
        return [
            f"{emitted} tokens in {steps} steps of the target, {emitted / steps:.2f} per step; "
            f"{rate}after {self._first - self._began:.1f} s for the first step and its compilation",
            *([] if acceptance is None else [acceptance]),
        ]
