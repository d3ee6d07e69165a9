"""Cuts long audio into windows of a Whisper's length, and reads times from their texts."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from specsamp_jax.models.whisper.features import HOP, log_mel
from specsamp_jax.models.whisper.model import WhisperConfig

STEP = 2
"""Frames per step of a timestamp: 0.02 s."""


class Piece(NamedTuple):
    """A part of a window's text between two timestamps.

    Attributes:
      start: The first frame, counted from the start of the window.
      end: The frame after the last.
      tokens: The tokens of the text, including timestamps.
      edges: Start and end of each token in seconds, counted from the start of the window; see `token_edges`. None: not
        computed.
    """

    start: int
    end: int
    tokens: Int[np.ndarray, "n"]
    edges: Float[np.ndarray, "m"] | None = None


class FixedWindows:
    """Adjacent windows, each with features of its own; the last is padded with silence.

    Attributes:
      timestamps: Whether the text of a window must have timestamps: False.
      num_frames: Total frames of sound.
      starts: The first frame of each window that can be decoded now: all of them.
    """

    timestamps = False

    def __init__(self, waveform: Float[np.ndarray, "N"], config: WhisperConfig):
        self._waveform, self._config = waveform, config
        self.num_frames = -(-waveform.size // HOP)
        self.starts = list(range(0, self.num_frames, config.num_frames))

    def features(self, start: int) -> Float[np.ndarray, "M F"]:
        """Returns the features of the window that begins at frame `start`."""
        size = self._config.num_frames * HOP
        sound = self._waveform[start * HOP :][:size]
        return log_mel(np.pad(sound, (0, size - sound.size)), self._config.num_mel_bins)

    def is_empty(self, start: int) -> bool:
        """Whether the window that begins at frame `start` has no sound: all samples are equal."""
        return bool(np.ptp(self._waveform[start * HOP :][: self._config.num_frames * HOP]) == 0)

    def split(self, tokens: Int[np.ndarray, "n"], start: int) -> tuple[list[Piece], int | None]:
        """Returns the whole text as one piece, or no piece for no text, and None: no further window depends on it."""
        piece = Piece(0, min(self._config.num_frames, self.num_frames - start), tokens)
        return [piece] if tokens.size else [], None


class SlidingWindows:
    """Windows that each begin at the end of the last complete piece of the window before.

    Features are computed once for the whole sound; after its end they are 0. A sound of at most one window is padded
    with silence first, as in `FixedWindows`: both are those of transformers.

    Attributes:
      timestamps: Whether the text of a window must have timestamps: True.
      num_frames: Total frames of sound.
      starts: The first frame of each window that can be decoded now: the first window's.
    """

    timestamps = True

    def __init__(self, waveform: Float[np.ndarray, "N"], config: WhisperConfig, first_timestamp: int):
        missing = max(0, config.num_frames * HOP - waveform.size)
        self._features = log_mel(np.pad(waveform, (0, missing)), config.num_mel_bins)
        self._config, self._first_timestamp = config, first_timestamp
        self.num_frames = -(-waveform.size // HOP) if missing else self._features.shape[1]
        self.starts = [0] if self.num_frames else []

    def features(self, start: int) -> Float[np.ndarray, "M F"]:
        """Returns the features of the window that begins at frame `start`."""
        window = self._features[:, start : start + self._config.num_frames]
        return np.pad(window, ((0, 0), (0, self._config.num_frames - window.shape[1])))

    def is_empty(self, start: int) -> bool:
        """Whether the window that begins at frame `start` has no sound: its features are equal."""
        return bool(np.ptp(self._features[:, start : start + self._config.num_frames]) == 0)

    def split(self, tokens: Int[np.ndarray, "n"], start: int) -> tuple[list[Piece], int | None]:
        """Returns the pieces of a window's text, and the first frame of the next window, or None."""
        num_frames = min(self._config.num_frames, self.num_frames - start)
        pieces, advance = split(tokens, num_frames, self._first_timestamp)
        following = start + advance
        return pieces, following if following < self.num_frames else None


def with_edges(pieces: list[Piece], edges: Float[np.ndarray, "_"]) -> list[Piece]:
    """Returns the pieces of a window's text, in order from its first token, with the times of their tokens."""
    ends = np.cumsum([piece.tokens.size for piece in pieces])
    return [
        piece._replace(edges=edges[end - piece.tokens.size : end + 1]) for piece, end in zip(pieces, ends, strict=True)
    ]


def split(tokens: Int[np.ndarray, "n"], num_frames: int, first_timestamp: int) -> tuple[list[Piece], int]:
    """Returns the pieces of a window's text, and the number of frames before the next window.

    A piece ends between two adjacent timestamps. If the text ends with a single timestamp, nothing follows it and the
    next window begins at the end of this one. Otherwise the text after the last pair was cut off by the end of the
    window, and the next window begins at that pair. A text without pairs is one piece that takes the whole window.

    Args:
      tokens: The generated tokens, without the end token.
      num_frames: Frames of sound in the window.
      first_timestamp: The token of 0.00 s.

    Source: Radford et al. (2022, arXiv 2212.04356), section 3.8, as implemented by transformers.
    """
    stamp = tokens >= first_timestamp
    ends = [i + 1 for i in range(tokens.size - 1) if stamp[i] and stamp[i + 1]]
    frame = (tokens - first_timestamp) * STEP
    if not ends:
        last = frame[stamp][-1:]
        end = int(last[0]) if last.size and last[0] > 0 else num_frames
        return ([Piece(0, end, tokens)] if tokens.size else []), num_frames
    ends_alone = bool(stamp[-1]) and not stamp[-2]
    if ends_alone:
        ends.append(tokens.size)
    begins = [0, *ends[:-1]]
    pieces = [Piece(int(frame[i]), int(frame[j - 1]), tokens[i:j]) for i, j in zip(begins, ends, strict=True)]
    # The rules exclude a pair at time 0. Without them, too, the next window must begin later than this one.
    advance = num_frames if ends_alone or pieces[-1].end <= 0 else pieces[-1].end
    return pieces, advance
