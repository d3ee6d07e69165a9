"""Long audio as windows that a Whisper can hear, and what their texts say of time."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from specsamp_jax.models.whisper.features import HOP, log_mel
from specsamp_jax.models.whisper.model import WhisperConfig

STEP = 2
"""Frames a timestamp: 0.02 s."""


class Piece(NamedTuple):
    """What one window says between two timestamps.

    Attributes:
      start: Its first frame within the window.
      end: The frame behind its last.
      tokens: What was said, the timestamps included.
    """

    start: int
    end: int
    tokens: Int[np.ndarray, "n"]


class FixedWindows:
    """Windows side by side, all known beforehand; each is heard on its own, the last with silence behind it.

    Attributes:
      num_frames: Frames of sound in all.
      starts: The first frames of the windows that can be heard at once.
    """

    def __init__(self, waveform: Float[np.ndarray, "N"], config: WhisperConfig):
        self._waveform, self._config = waveform, config
        self.num_frames = -(-waveform.size // HOP)
        self.starts = list(range(0, self.num_frames, config.num_frames))

    def features(self, start: int) -> Float[np.ndarray, "M F"]:
        """The features of the window that begins at a frame."""
        size = self._config.num_frames * HOP
        sound = self._waveform[start * HOP :][:size]
        return log_mel(np.pad(sound, (0, size - sound.size)), self._config.num_mel_bins)

    def split(self, tokens: Int[np.ndarray, "n"], start: int) -> tuple[list[Piece], int | None]:
        """The whole text as one piece, and that no window follows from it."""
        return [Piece(0, min(self._config.num_frames, self.num_frames - start), tokens)], None


class SlidingWindows:
    """Each window begins where the last whole piece of the one before it ended.

    The features are those of the whole sound; behind its end they are 0.

    Attributes:
      num_frames: Frames of sound in all.
      starts: The first frame of the first window.
    """

    def __init__(self, waveform: Float[np.ndarray, "N"], config: WhisperConfig, first_timestamp: int):
        self._features = log_mel(waveform, config.num_mel_bins)
        self._config, self._first_timestamp = config, first_timestamp
        self.num_frames = self._features.shape[1]
        self.starts = [0] if self.num_frames else []

    def features(self, start: int) -> Float[np.ndarray, "M F"]:
        """The features of the window that begins at a frame."""
        window = self._features[:, start : start + self._config.num_frames]
        return np.pad(window, ((0, 0), (0, self._config.num_frames - window.shape[1])))

    def split(self, tokens: Int[np.ndarray, "n"], start: int) -> tuple[list[Piece], int | None]:
        """The pieces of a window's text, and the first frame of the next window, if there is one."""
        num_frames = min(self._config.num_frames, self.num_frames - start)
        pieces, advance = split(tokens, num_frames, self._first_timestamp)
        following = start + advance
        return pieces, following if following < self.num_frames else None


def split(tokens: Int[np.ndarray, "n"], num_frames: int, first_timestamp: int) -> tuple[list[Piece], int]:
    """The pieces of a window's text, and how many frames of the window are done with.

    Pieces end where two timestamps stand together. A text that ends with one timestamp alone says that nothing
    follows: the window is done. Else what stands behind the last pair was cut off by the window's end: it is left to
    the next window, which begins at that pair. A text without pairs is one piece and the whole window.

    Args:
      tokens: What was generated, the end token excepted.
      num_frames: Frames of sound in the window.
      first_timestamp: The token of 0.00 s.

    Source: Radford et al. (2022, arXiv 2212.04356), section 3.8, as transformers does it.
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
    # The rules let no pair stand before the first step; without them a window must not be heard for ever.
    advance = num_frames if ends_alone or pieces[-1].end <= 0 else pieces[-1].end
    return pieces, advance
