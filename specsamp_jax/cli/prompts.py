"""Prompts of `specsamp generate`: texts and conversations, from options and files."""

import contextlib
import json
import os
import select
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specsamp_jax._files import brief, decode
from specsamp_jax.cli.cache import padded_size
from specsamp_jax.text import CheckpointTokenizer

_MAX_PROMPT_BYTES = 1 << 26
_PIPE_SECONDS = 5  # in which a pipe's writer must open it


class Prompt(NamedTuple):
    """A text to continue, or a conversation to answer.

    Attributes:
      text: The text to continue; empty for a conversation.
      messages: The conversation; None for a text.
    """

    text: str
    messages: Sequence[Mapping[str, Any]] | None = None

    def encode(self, tokenizer: CheckpointTokenizer) -> list[int]:
        """Returns the tokens, for a conversation by the chat template."""
        return tokenizer.encode(self.text) if self.messages is None else tokenizer.encode_chat(self.messages)


def chat(message: str, system: str | None = None) -> Prompt:
    """Returns a conversation of one message of the user, after one of the system if there is one."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return Prompt("", [*before, {"role": "user", "content": message}])


def read_prompt(file: Path) -> str:
    """Returns the text of a prompt file, which may be a pipe; `-` is standard input.

    Raises:
      ValueError: The file cannot be read, is too large for a prompt, or is not text in UTF-8.
    """
    return _read(file, "--prompt-file")


def read_prompts(file: Path) -> list[Prompt]:
    """Returns the prompts in a file: one per line, or JSON lines if its name ends with `.jsonl`.

    Empty lines are left out. A line of JSON is a text, or an object with `prompt`, a text to continue, or `messages`, a
    conversation to answer; other entries of the object are not read.

    Raises:
      ValueError: The file cannot be read, is too large, is not text in UTF-8, or has no prompt or a broken line.
    """
    # Not `splitlines`, which splits at characters that JSON and text may hold, such as U+2028.
    lines = [line.removesuffix("\r") for line in _read(file, "--prompts").split("\n")]
    parse = _parse if file.suffix == ".jsonl" else lambda line, source: Prompt(line)
    prompts = [parse(line, f"--prompts {str(file)!r}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {str(file)!r} must hold a prompt per line, and holds none.")
    return prompts


def _parse(line: str, source: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: it must be JSON, but it cannot be parsed: {error}.") from None
    if isinstance(value, str):
        return Prompt(value)
    if isinstance(value, dict):
        text, messages = value.get("prompt"), value.get("messages")
        if isinstance(text, str) and messages is None:
            return Prompt(text)
        if text is None and _is_conversation(messages):
            return Prompt("", messages)
    raise ValueError(
        f"{source}: it must be a text, or an object with a text `prompt` or a list `messages` of objects with `role` "
        f"and `content`, got {brief(value)}."
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def _read(file: Path, option: str) -> str:
    name = "standard input" if str(file) == "-" else str(file)
    try:
        if str(file) != "-":
            content = _read_file(file)
        elif sys.stdin is None:
            raise ValueError(f"{option} - needs standard input, which is closed.")
        else:
            content = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{option} {name!r}: {error.strerror}.") from error
    if len(content) > _MAX_PROMPT_BYTES:
        raise ValueError(f"{option} {name!r} must have at most {_MAX_PROMPT_BYTES:,} bytes, and has more.")
    return decode(content, f"{option} {name!r}")


def _read_file(file: Path) -> bytes:
    """Reads at most a byte more than a prompt may have, of a file or pipe."""
    if not file.is_fifo():
        with file.open("rb") as opened:
            return opened.read(_MAX_PROMPT_BYTES + 1)
    # `open` would wait for ever for a writer.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as opened:
        first = b""
        if not select.select([descriptor], [], [], _PIPE_SECONDS)[0]:
            # Without a writer a pipe is at its end; with one there is nothing to read yet.
            with contextlib.suppress(BlockingIOError):
                first = os.read(descriptor, 1)
                if not first:
                    raise ValueError(f"{file} is a pipe that no program opened for writing in {_PIPE_SECONDS} seconds.")
        os.set_blocking(descriptor, True)
        return first + opened.read(_MAX_PROMPT_BYTES + 1)


def pad(prompts: Sequence[Sequence[int]], num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns prompts as one array, padded with token 0 to a `padded_size`, and their lengths.

    Raises:
      ValueError: A prompt has a token outside the model's vocabulary of `num_tokens`.
    """
    largest = max(map(max, prompts))
    if largest >= num_tokens:
        raise ValueError(f"The tokenizer does not fit the target: it gave token {largest} of {num_tokens}.")
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = np.zeros((len(prompts), padded_size(int(lengths.max()))), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded, lengths
