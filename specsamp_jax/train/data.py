"""Training data from files: streams of tokens from texts, and windows of features from sounds."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from specsamp_jax._files import read_bytes, read_text
from specsamp_jax.models import WhisperConfig
from specsamp_jax.speech.sound_files import load_audio
from specsamp_jax.speech.windows import FixedWindows
from specsamp_jax.text import CheckpointTokenizer

TEXTS = (".txt", ".md")
_MAX_BYTES = 1 << 30  # of a file of text
_LONGEST_PASSAGE = 2000  # characters, after which a passage ends with its line


class TextData(NamedTuple):
    """Tokens of texts.

    Attributes:
      train: Tokens to train on.
      held_out: Tokens to measure on.
    """

    train: Int[np.ndarray, "N"]
    held_out: Int[np.ndarray, "M"]


class Window(NamedTuple):
    """A window of sound.

    Attributes:
      features: Log-mel features.
      held_out: Whether it is kept for measuring.
    """

    features: Float[np.ndarray, "M F"]
    held_out: bool


def is_held_out(content: bytes, fraction: float) -> bool:
    """Whether content is held out: a property of the content alone, so that equal contents are on the same side."""
    return int.from_bytes(hashlib.sha256(content).digest()[:8]) < fraction * 2**64


def find_files(sources: Sequence[Path], suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files among `sources`, and those with one of the suffixes in the folders among them.

    Raises:
      ValueError: A source is not there, or there is no such file at all.
    """
    files = []
    for source in sources:
        if source.is_dir():
            files += sorted(path for path in source.rglob("*") if path.suffix.lower() in suffixes and path.is_file())
        elif source.exists():
            files.append(source)
        else:
            raise ValueError(f"The data must be files or folders, but there is no {source}.")
    if not files:
        names = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ValueError(f"The data must hold files ending in {names}; {_listed(sources)} have none.")
    return files


def digest(files: Sequence[Path]) -> str:
    """Returns a digest of the contents of files, in order."""
    total = hashlib.sha256()
    for file in files:
        total.update(hashlib.sha256(read_bytes(file, max_bytes=1 << 32)).digest())
    return total.hexdigest()


def read_texts(files: Sequence[Path], tokenizer: CheckpointTokenizer, held_out: float, length: int) -> TextData:
    """Returns the tokens of text files, those of some passages held out.

    Passages end at empty lines, and at the end of a line after 2,000 characters. Each is held out or not by its hash.

    Args:
      files: Files in UTF-8.
      tokenizer: The target's.
      held_out: The fraction of passages to hold out.
      length: The fewest tokens needed on each side.

    Raises:
      ValueError: A file is not text, or one side has too few tokens.
    """
    sides: tuple[list[int], list[int]] = [], []
    bos = tokenizer.bos_token
    for file in files:
        for side in sides:
            side += [] if bos is None else [bos]
        kept = list(passages(read_text(file, max_bytes=_MAX_BYTES)))
        for passage, encoded in zip(
            kept, tokenizer.tokenizer.encode_batch(kept, add_special_tokens=False), strict=True
        ):
            sides[is_held_out(passage.encode(), held_out)].extend(encoded.ids)
    for name, side in zip(("for training", "held out"), sides, strict=True):
        if len(side) < length:
            raise ValueError(
                f"The texts must have at least {length:,} tokens {name}, got {len(side):,} with held_out = {held_out}: "
                "more text is needed, or a shorter length, or another fraction."
            )
    train, rest = (np.array(side, np.int32) for side in sides)
    return TextData(train, rest)


def passages(text: str) -> Iterator[str]:
    """Yields the passages of a text, which joined are the text."""
    passage = ""
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        passage += line
        if (not line.strip() and passage.strip()) or len(passage) > _LONGEST_PASSAGE:
            yield passage
            passage = ""
    if passage:
        yield passage


def read_windows(files: Sequence[Path], config: WhisperConfig, held_out: float) -> Iterator[Window]:
    """Yields the windows of sound files; all windows of a file are held out, or none.

    Raises:
      ValueError: A file is no sound.
    """
    for file in files:
        waveform = load_audio(file)
        aside = is_held_out(waveform.tobytes(), held_out)
        windows = FixedWindows(waveform, config)
        for start in windows.starts:
            yield Window(windows.features(start), aside)


def _listed(sources: Sequence[Path]) -> str:
    return ", ".join(map(str, sources[:3])) + (" and others" if len(sources) > 3 else "")
