"""Summarisation by Qwen2.5-Coder-Instruct through its chat template, without training.

`SPECSAMP_QWEN=TARGET_FOLDER` names a target whose drafts come from n-grams, `TARGET_FOLDER:DRAFTER_FOLDER` a pair. Rows
of a pair are kept as those of the task `pair`.
"""

import json
import os
from pathlib import Path

from summarization import build, load_pair
from tasks import Task

from specsamp_jax.models import load_checkpoint
from specsamp_jax.text import load_tokenizer

REQUEST = "Summarize this description of a software package in one line of at most ten words, without its name:\n\n"
SIZES = {896: "0.5B", 1536: "1.5B"}
"""Parameters by the width of a hidden state."""

LONGEST = 1000
"""The most characters of a description that are read; 9 in 10 are shorter."""


def folders() -> list[Path]:
    """The folders of the target and, for a pair, of the drafter.

    Raises:
      ValueError: `SPECSAMP_QWEN` names none.
    """
    found = os.environ.get("SPECSAMP_QWEN")
    if not found:
        raise ValueError("SPECSAMP_QWEN must name the target's folder, or TARGET:DRAFTER, and is not set.")
    return [Path(each) for each in found.split(":")]


def make_task(dtype: str | None = None) -> Task:
    """The task on the held-out pairs; without a drafter's folder the target stands for it, and no row uses it."""
    target, *drafter = folders()
    tokenizer = load_tokenizer(target)
    alone = None if drafter else load_checkpoint(target, dtype=dtype)
    pair = load_pair(target, drafter[0], dtype) if alone is None else (alone, alone)
    sizes = [SIZES[json.loads((folder / "config.json").read_text())["hidden_size"]] for folder in (target, *drafter)]
    words = f"Qwen2.5-Coder-{sizes[0]}-Instruct, {f'drafter of {sizes[1]}' if drafter else 'n-grams as drafter'}"

    def prompt_fn(description: str) -> list[int]:
        return tokenizer.encode_chat([{"role": "user", "content": REQUEST + description[:LONGEST]}])

    return build("pair" if drafter else "qwen", words, tokenizer, prompt_fn, pair)
