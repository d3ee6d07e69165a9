"""Summarisation: the synopsis of a Debian package from its long description.

The target is SmolLM2-135M-Instruct, fine-tuned by `train_summarization.py`, which also distils the drafter. Qwen2.5
answers through its chat template, without training: `SPECSAMP_QWEN=TARGET_FOLDER:DRAFTER_FOLDER` chooses it.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import summarization_data as data
from tasks import Task, pad

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
REQUEST = "Summarize this description of a software package in one line of at most ten words, without its name:\n\n"
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


def make_task(dtype: str | None = None) -> Task:
    """The task on the held-out pairs, with the models that were trained or that `SPECSAMP_QWEN` names."""
    pairs = data.read()["test"]
    chat = os.environ.get("SPECSAMP_QWEN")
    target_folder, draft_folder = map(Path, chat.split(":")) if chat else (TARGET, DRAFTER)
    tokenizer = load_tokenizer(target_folder)
    end = end_token(tokenizer)
    if chat:
        asks = [[{"role": "user", "content": REQUEST + pair.description}] for pair in pairs]
        prompts = [tokenizer.encode_chat(messages) for messages in asks]
    else:
        prompts = [prompt_tokens(tokenizer, pair.description) for pair in pairs]
    answers = [answer_tokens(tokenizer, pair.synopsis, end) for pair in pairs]
    target, draft = (load_checkpoint(folder, dtype=dtype) for folder in (target_folder, draft_folder))
    draft = models.with_vocab_size(draft, models.vocab_size(target))
    padded, lengths = pad(prompts, 0)
    return Task(
        name="summarization",
        models="Qwen2.5-Coder, zero-shot" if chat else "SmolLM2-135M fine-tuned, distilled drafter",
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
        models_fn=lambda index: (target, draft),
        prepare_fn=lambda num_texts: None,
        decode=lambda tokens: tokenizer.decode(tokens).strip(),
    )


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
