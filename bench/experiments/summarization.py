"""Summarisation: the synopsis of a Debian package from its long description.

The target is SmolLM2-135M-Instruct, fine-tuned by `train_summarization.py`, which also distils the drafter.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import summarization_data as data
from tasks import Task, pad

import specsamp_jax as ss
from specsamp_jax import models
from specsamp_jax.cli import pair as fixture
from specsamp_jax.cli.docstrings import held_out_docstrings
from specsamp_jax.models import load_checkpoint
from specsamp_jax.text import CheckpointTokenizer, load_tokenizer

WIDTH = 160
"""The most tokens of a prompt; longer descriptions are cut. 9 in 10 are shorter."""

MAX_NEW_TOKENS = 32
TRIVIAL_WORDS = 8
"""Words of the trivial system: as many as the median synopsis has."""

ASK = "\nSummary:"
TARGET, DRAFTER = data.FOLDER / "target", data.FOLDER / "drafter"


def prompt_tokens(tokenizer: CheckpointTokenizer, description: str) -> list[int]:
    """The tokens of a prompt for the fine-tuned models."""
    ask = tokenizer.tokenizer.encode(ASK).ids
    return tokenizer.tokenizer.encode(description).ids[: WIDTH - len(ask)] + ask


def answer_tokens(tokenizer: CheckpointTokenizer, synopsis: str, end_token: int) -> list[int]:
    """The tokens that follow a prompt, cut to `MAX_NEW_TOKENS`."""
    return [*tokenizer.tokenizer.encode(" " + synopsis).ids[: MAX_NEW_TOKENS - 1], end_token]


def end_token(tokenizer: CheckpointTokenizer) -> int:
    """The token that ends an answer."""
    if tokenizer.eos_token is None:
        raise ValueError(f"{tokenizer.path} must name an eos_token.")
    return tokenizer.eos_token


def build(
    name: str,
    words: str,
    tokenizer: CheckpointTokenizer,
    prompt_fn: Callable[[str], list[int]],
    pair: tuple[ss.Model, ss.Model],
) -> Task:
    """The task on the held-out pairs, with prompts of descriptions by `prompt_fn`; `words` name the models."""
    pairs, end = data.read()["test"], end_token(tokenizer)
    prompts = [prompt_fn(pair.description) for pair in pairs]
    answers = [answer_tokens(tokenizer, pair.synopsis, end) for pair in pairs]
    padded, lengths = pad(prompts, 0)
    return Task(
        name=name,
        models=words,
        metric="rouge",
        ids=[pair.name for pair in pairs],
        groups=["Debian"] * len(pairs),
        references=[pair.synopsis for pair in pairs],
        trivial=[" ".join(pair.description.split()[:TRIVIAL_WORDS]) for pair in pairs],
        prompts=padded,
        lengths=lengths,
        texts=pad([p + a for p, a in zip(prompts, answers, strict=True)], -1)[0],
        max_new_tokens=MAX_NEW_TOKENS,
        end_tokens=(end,),
        processor=None,
        models_fn=lambda index: pair,
        prepare_fn=lambda num_texts: None,
        decode=lambda tokens: tokenizer.decode(tokens).strip(),
    )


def load_pair(target: Path, drafter: Path, dtype: str | None) -> tuple[ss.Model, ss.Model]:
    """The models in two folders, the drafter with the target's vocabulary size."""
    large, small = (load_checkpoint(folder, dtype=dtype) for folder in (target, drafter))
    return large, models.with_vocab_size(small, models.vocab_size(large))


def make_task(dtype: str | None = None) -> Task:
    """The task with the models that `train_summarization.py` trained."""
    tokenizer = load_tokenizer(TARGET)
    prompt_fn = functools.partial(prompt_tokens, tokenizer)
    words = "SmolLM2-135M fine-tuned, distilled drafter"
    return build("summarization", words, tokenizer, prompt_fn, load_pair(TARGET, DRAFTER, dtype))


def make_fixture(num_texts: int) -> Task:
    """The task on the pair in the package, which continues docstrings: for machines without data and weights."""
    pair = fixture.load_pair()
    width, new = 16, 16
    encoded = (pair.encode(each.text) for each in held_out_docstrings())
    texts = list(itertools.islice((tokens for tokens in encoded if len(tokens) >= width + new), num_texts))
    prompts = np.array([tokens[:width] for tokens in texts], np.int32)
    first = [pair.tokenizer.decode(tokens[1:width]) for tokens in texts]
    return Task(
        name="summarization",
        models="fixture: the package's pair on docstrings",
        metric="rouge",
        ids=[str(i) for i in range(len(texts))],
        groups=["docstrings"] * len(texts),
        references=[pair.tokenizer.decode(tokens[width : width + new]).strip() for tokens in texts],
        trivial=[" ".join(text.split()[:TRIVIAL_WORDS]) for text in first],
        prompts=prompts,
        lengths=np.full(len(texts), width, np.int32),
        texts=np.array([tokens[: width + new] for tokens in texts], np.int32),
        max_new_tokens=new,
        end_tokens=(pair.end_token,),
        processor=None,
        models_fn=lambda index: (pair.target, pair.drafter),
        prepare_fn=lambda num_texts: None,
        decode=lambda tokens: pair.tokenizer.decode(tokens).strip(),
    )
