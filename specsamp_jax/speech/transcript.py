"""Results of `transcribe`: texts, their segments, and counts."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from specsamp_jax._types import Stats
from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE
from specsamp_jax.speech.checkpoint import Speech
from specsamp_jax.speech.windows import Piece
from specsamp_jax.speech.words import Word, timed_words


class Segment(NamedTuple):
    """The text of a span of time.

    Attributes:
      start: Seconds from the beginning of the sound.
      end: Seconds from the beginning of the sound.
      text: The text.
      words: Its words with their times, if `transcribe` was asked for them.
    """

    start: float
    end: float
    text: str
    words: tuple[Word, ...] = ()


class Transcript(NamedTuple):
    """The text of an utterance.

    Attributes:
      text: The whole text.
      segments: Its parts: between timestamps with timestamps, else one per window.
      tokens: The generated tokens, including timestamps and without prompts and end tokens.
      language: The code of the language, passed or detected; None for an English-only model.
    """

    text: str
    segments: tuple[Segment, ...]
    tokens: Int[np.ndarray, "n"]
    language: str | None


class Transcription(NamedTuple):
    """The texts of all utterances, and the counts of the decoding loops.

    Attributes:
      transcripts: One per utterance.
      stats: Sums over all batches of windows: steps, tokens emitted by each of N utterances, drafts verified and
        accepted at each of K draft positions, and the flags of each utterance's degenerate rows. Windows that were
        decoded again count each time.
      verify_states: The state of the verification rule after each batch, its windows as rows; () where it has none.
      num_again: How often a window was decoded again; see `Fallback`.
      num_silent: Windows without speech; see `Fallback`.
    """

    transcripts: tuple[Transcript, ...]
    stats: Stats
    verify_states: tuple[Any, ...] = ()
    num_again: int = 0
    num_silent: int = 0


def text_of(target: Speech, tokens: Int[np.ndarray, "n"]) -> str:
    """Returns the text of generated tokens, without timestamps and special tokens."""
    first = target.settings.first_timestamp
    shown = tokens if first is None else tokens[tokens < first]
    return target.tokenizer.decode(shown.tolist(), skip_special_tokens=True)


def join_pieces(target: Speech, pieces: list[tuple[int, Piece]], language: str | None) -> Transcript:
    """Returns the transcript of pieces, each with the first frame of its window."""
    texts = [text_of(target, piece.tokens) for _, piece in pieces]
    segments = (
        Segment(
            seconds(start + piece.start),
            seconds(start + piece.end),
            text.strip(),
            _words(target, start, piece, language),
        )
        for (start, piece), text in zip(pieces, texts, strict=True)
    )
    tokens = np.concatenate([np.zeros(0, np.int32), *(piece.tokens for _, piece in pieces)])
    return Transcript("".join(texts).strip(), tuple(segments), tokens, language)


def _words(target: Speech, start: int, piece: Piece, language: str | None) -> tuple[Word, ...]:
    if piece.edges is None:
        return ()
    end_token = target.settings.end_tokens[0]
    options = {"end_token": end_token, "language": language, "offset": seconds(start)}
    return timed_words(target.tokenizer, piece.tokens, piece.edges, **options)


def seconds(num_frames: int) -> float:
    """Returns the time of a number of frames."""
    return num_frames * HOP / SAMPLE_RATE
