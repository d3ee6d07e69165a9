"""Log-mel features of a waveform, Whisper's input (Radford et al., 2022, arXiv 2212.04356, section 2.2).

Computed by NumPy in float64: it takes milliseconds per window, and float32 is visibly less accurate for quiet filters.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000
"""Samples per second of every waveform."""

HOP = 160
"""Samples between frames: 10 ms."""

_WINDOW = 400  # samples in a frame: 25 ms
_FLOOR = 1e-10  # the smallest power, before the logarithm
_RANGE = 8.0  # powers of ten below the loudest value that are kept
_BLOCK = 3000  # frames transformed at once, to bound memory for long audio

# Slaney's mel scale: linear up to 1000 Hz, then logarithmic, 27 mels for each factor of 6.4 (Slaney, 1998, Auditory
# Toolbox, technical report 1998-010).
_LINEAR_HERTZ, _LOGARITHMIC_FROM = 200 / 3, 1000.0
_LOGARITHMIC_STEP = np.log(6.4) / 27


def log_mel(waveform: Float[np.ndarray, "N"], num_mel_bins: int) -> Float[np.ndarray, "M F"]:
    """Returns the features of a waveform, float32: one frame per 10 ms, `N // 160` frames.

    The power of a 25 ms Hann window around each frame is summed in `num_mel_bins` triangular filters. Its logarithm to
    base 10 is clipped at 8 below the largest value of the whole waveform, and scaled as `(x + 4) / 4`. The waveform is
    mirrored at its ends.

    Args:
      waveform: Samples from -1 to 1, 16,000 per second.
      num_mel_bins: M: 80, or 128 for large-v3 and models distilled from it.

    Raises:
      ValueError: The waveform has another shape or dtype, has fewer than 201 samples, or is not finite.
    """
    waveform = checked("waveform", waveform)
    if waveform.size <= _WINDOW // 2:
        raise ValueError(f"waveform must have more than {_WINDOW // 2} samples to be mirrored, got {waveform.size}.")
    padded = np.pad(waveform.astype(np.float64), _WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][: waveform.size // HOP]
    # The window has a period of 400 samples, not 399, as is usual for a Fourier transform.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    filters = mel_filters(num_mel_bins)
    mel = np.empty((num_mel_bins, len(frames)))
    for i in range(0, len(frames), _BLOCK):
        spectrum = np.fft.rfft(frames[i : i + _BLOCK] * window)
        mel[:, i : i + _BLOCK] = filters @ (spectrum.real**2 + spectrum.imag**2).T
    mel = np.log10(np.maximum(mel, _FLOOR))
    return ((np.maximum(mel, mel.max(initial=-np.inf) - _RANGE) + 4) / 4).astype(np.float32)


@functools.cache
def mel_filters(num_mel_bins: int) -> Float[np.ndarray, "M 201"]:
    """Returns the weight of each frequency from 0 to 8000 Hz in each filter.

    Filter m is a triangle of area 1 in Hz, from the centre of the filter below to the centre of the filter above.
    Centres are equally spaced on Slaney's mel scale.
    """
    top = _LOGARITHMIC_FROM / _LINEAR_HERTZ + np.log(SAMPLE_RATE / 2 / _LOGARITHMIC_FROM) / _LOGARITHMIC_STEP
    mels = np.linspace(0, top, num_mel_bins + 2)
    above = mels - _LOGARITHMIC_FROM / _LINEAR_HERTZ
    hertz = np.where(
        above < 0, mels * _LINEAR_HERTZ, _LOGARITHMIC_FROM * np.exp(_LOGARITHMIC_STEP * np.maximum(above, 0))
    )
    frequencies = np.linspace(0, SAMPLE_RATE / 2, _WINDOW // 2 + 1)
    lower, centre, upper = (hertz[i : i + num_mel_bins, None] for i in range(3))
    rising, falling = (frequencies - lower) / (centre - lower), (upper - frequencies) / (upper - centre)
    return np.maximum(np.minimum(rising, falling), 0) * 2 / (upper - lower)


def checked(name: str, waveform: Any) -> np.ndarray:
    """Returns the waveform unchanged, after a check.

    Raises:
      ValueError: The waveform is not a one-dimensional array of finite floating-point samples.
    """
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        kind = (
            f"{waveform.dtype}{list(waveform.shape)}" if isinstance(waveform, np.ndarray) else type(waveform).__name__
        )
        raise ValueError(f"{name} must be a floating-point array of shape [N], samples from -1 to 1, got {kind}.")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} must be finite, but holds NaN or infinity.")
    return waveform
