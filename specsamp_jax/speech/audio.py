"""Reads WAV files as waveforms of 16,000 samples per second."""

import os
import struct
from math import gcd
from pathlib import Path

import numpy as np
from jaxtyping import Float

from specsamp_jax._files import read_bytes
from specsamp_jax.models.whisper.features import SAMPLE_RATE, checked

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE  # format tags
_UNKNOWN_SIZE = 0xFFFFFFFF  # the size of data that was written to a pipe
_MAX_BYTES = 1 << 32  # sizes in a WAV file have 32 bits
# Sample rates in use lie between these. At a rate of 1 or 2**31 a resampled file would not fit in memory.
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 768_000

# The interpolating filter: its zero crossings on each side, and Kaiser's beta for 80 dB of attenuation (Kaiser, 1974:
# 0.1102 (80 - 8.7)). So its transition takes 8 % of the lower rate's band, and the cutoff is its middle.
_ZERO_CROSSINGS, _BETA, _CUTOFF = 64, 7.857, 0.96
_BLOCK = 1 << 12  # outputs computed at once, so that long sounds take little memory


def load_wav(path: str | os.PathLike[str]) -> Float[np.ndarray, "N"]:
    """Returns the sound of a WAV file, float32 from -1 to 1, its channels averaged, at 16,000 samples per second.

    Args:
      path: A RIFF file of PCM with 8, 16, 24 or 32 bits, or of floating point with 32 or 64, at a sample rate from
        1,000 to 768,000.

    Raises:
      ValueError: There is no such file, it is no regular file, has another format, is cut off or holds no samples.
    """
    path = Path(path)
    return parse_wav(path, read_sound(path))


def read_sound(path: Path) -> bytes:
    """Returns the content of a regular file of at most 4 GiB; raises ValueError if there is none."""
    try:
        return read_bytes(path, max_bytes=_MAX_BYTES)
    except FileNotFoundError:
        raise ValueError(f"{path} cannot be read: No such file or directory.") from None


def check_rate(path: Path, rate: int) -> None:
    """Raises ValueError if a sample rate is not in use anywhere."""
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise ValueError(
            f"{path} must have a sample rate from {_LOWEST_RATE:,} to {_HIGHEST_RATE:,} per second, got {rate:,}."
        )


def parse_wav(path: Path, content: bytes) -> Float[np.ndarray, "N"]:
    """Returns the sound in the content of a WAV file, as `load_wav` does; `path` names it in errors."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        raise ValueError(f"{path} must be a WAV file, but does not begin as one; other formats can be converted to it.")
    chunks = _chunks(path, content)
    for name in (b"fmt ", b"data"):
        if name not in chunks:
            raise ValueError(f"{path} must hold a chunk {name.decode()!r}, which is missing.")
    described = chunks[b"fmt "]
    if len(described) < 16:
        raise ValueError(f"The chunk 'fmt ' of {path} must have at least 16 bytes, got {len(described)}.")
    tag, num_channels, rate, _, frame_size, bits = struct.unpack_from("<HHIIHH", described)
    if tag == _EXTENSIBLE and len(described) >= 26:
        (tag,) = struct.unpack_from("<H", described, 24)  # the first bytes of a longer name
    if (tag, bits) not in {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}:
        raise ValueError(
            f"{path} must be PCM of 8, 16, 24 or 32 bits or floats of 32 or 64, got format {tag} of {bits} bits."
        )
    if not num_channels or frame_size != num_channels * bits // 8:
        raise ValueError(
            f"{path} must have frames of one sample per channel: got {num_channels} channels of {bits} bits in frames "
            f"of {frame_size} bytes."
        )
    check_rate(path, rate)
    data = chunks[b"data"]
    if len(data) < frame_size:
        raise ValueError(
            f"{path} holds no samples: its chunk 'data' has {len(data)} of {len(content):,} bytes. A recorder that was "
            "interrupted leaves such a header; the sound after it can be restored with an audio editor."
        )
    samples = _samples(data[: len(data) - len(data) % frame_size], tag, bits).reshape(-1, num_channels)
    return resample(checked(str(path), samples.mean(1, dtype=np.float32)), rate)


def resample(waveform: Float[np.ndarray, "N"], rate: int) -> Float[np.ndarray, "M"]:
    """Returns a waveform at 16,000 samples per second, float32; `ceil(N * 16000 / rate)` samples.

    Sample m is the band-limited interpolation of the waveform at `m * rate / 16000`: a sinc whose cutoff is just below
    half of the lower rate, under a Kaiser window. Outside the waveform there is silence.

    Args:
      waveform: The samples.
      rate: Samples per second of `waveform`.

    Source: Crochiere and Rabiner (1983), Multirate Digital Signal Processing, section 2.3.
    """
    if rate == SAMPLE_RATE or not waveform.size:
        return waveform.astype(np.float32)
    divisor = gcd(rate, SAMPLE_RATE)
    up, down = SAMPLE_RATE // divisor, rate // divisor
    # In units of input samples: the sinc is stretched if the output has the lower rate.
    band = _CUTOFF * min(1.0, SAMPLE_RATE / rate)
    reach = int(np.ceil(_ZERO_CROSSINGS * max(1.0, rate / SAMPLE_RATE)))
    offsets = np.arange(-reach + 1, reach + 1)
    padded = np.pad(waveform.astype(np.float64), (reach - 1, reach))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach)
    resampled = np.empty(-(-waveform.size * up // down), np.float32)
    # Outputs m, m + up, ... have the same offset from the input sample before them, and so share one set of taps.
    for m in range(min(up, resampled.size)):
        whole, phase = divmod(m * down, up)
        distance = phase / up - offsets
        taps = band * np.sinc(band * distance) * np.i0(_BETA * np.sqrt(np.maximum(1 - (distance / reach) ** 2, 0)))
        taps /= np.i0(_BETA)
        outputs, inputs = resampled[m::up], windows[whole::down]
        for i in range(0, outputs.size, _BLOCK):
            outputs[i : i + _BLOCK] = inputs[i : i + _BLOCK][: outputs.size - i] @ taps
    return resampled


def _chunks(path: Path, content: bytes) -> dict[bytes, bytes]:
    """The first chunk of each name, up to and including `data`."""
    found, position = {}, 12
    while position + 8 <= len(content) and b"data" not in found:
        name, size = struct.unpack_from("<4sI", content, position)
        position += 8
        if name == b"data" and size == _UNKNOWN_SIZE:
            size = len(content) - position
        if position + size > len(content):
            raise ValueError(
                f"{path} is cut off: its chunk {name.decode('latin-1')!r} must have {size} bytes, got "
                f"{len(content) - position}."
            )
        found.setdefault(name, content[position : position + size])
        position += size + size % 2
    return found


def _samples(data: bytes, tag: int, bits: int) -> Float[np.ndarray, "N"]:
    if tag == _FLOAT:
        # A sample beyond float32 becomes infinite, which `checked` reports.
        with np.errstate(over="ignore"):
            return np.frombuffer(data, f"<f{bits // 8}").astype(np.float32)
    if bits == 8:  # without sign, around 128
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / 128
    if bits == 24:  # the upper three bytes of four
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        return (wide.view("<i4")[:, 0] / 2**31).astype(np.float32)
    return (np.frombuffer(data, f"<i{bits // 8}") / 2.0 ** (bits - 1)).astype(np.float32)
