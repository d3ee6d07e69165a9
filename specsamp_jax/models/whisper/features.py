"""Log-mel features of a waveform, as Whisper was trained on them (Radford et al., 2022, arXiv 2212.04356, section 2.2).

NumPy, in float64: it takes milliseconds a window, and the quiet filters are those where float32 shows.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float

SAMPLE_RATE = 16_000
"""Samples a second of all waveforms here."""

HOP = 160
"""Samples between frames: 10 ms."""

_WINDOW = 400  # samples that a frame sees: 25 ms
_FLOOR = 1e-10  # the least power, before its logarithm
_RANGE = 8.0  # powers of ten below the loudest that are told apart
_BLOCK = 3000  # frames transformed at once, so that long audio takes little memory

# Slaney's mel scale: linear up to 1000 Hz, then logarithmic, 27 mels for each factor of 6.4 (Slaney, 1998, Auditory
# Toolbox, technical report 1998-010).
_LINEAR_HERTZ, _LOGARITHMIC_FROM = 200 / 3, 1000.0
_LOGARITHMIC_STEP = np.log(6.4) / 27


def log_mel(waveform: Float[np.ndarray, "N"], num_mel_bins: int) -> Float[np.ndarray, "M F"]:
    """Returns the features of a waveform, float32: one frame each 10 ms, `N // 160` of them.

    The power of a 25 ms Hann window around each frame, in `num_mel_bins` triangular filters, as logarithm to base 10;
    what is 80 dB below the loudest of the whole waveform is raised to that; then `(x + 4) / 4`. At its ends the
    waveform is mirrored.

    Args:
      waveform: Samples from -1 to 1, 16,000 a second.
      num_mel_bins: M: 80, or 128 for large-v3 and what was distilled from it.

    Raises:
      ValueError: A waveform of another shape or type, shorter than 201 samples, or not finite.
    """
    waveform = checked("waveform", waveform)
    if waveform.size <= _WINDOW // 2:
        raise ValueError(f"waveform must have more than {_WINDOW // 2} samples to be mirrored, got {waveform.size}.")
    padded = np.pad(waveform.astype(np.float64), _WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP][: waveform.size // HOP]
    # A period of the window is 400 samples, not 399: it is meant for the transform.
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
    """Returns the weights of each frequency from 0 to 8000 Hz in each filter.

    Filter m is a triangle from the centre of its lower neighbour to that of its upper one, of area 1 in Hz; centres
    are equally far apart in Slaney's mels.
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
    """Returns a waveform as it is.

    Raises:
      ValueError: It is no array of finite floating-point samples with one axis.
    """
    if not isinstance(waveform, np.ndarray) or waveform.ndim != 1 or not np.issubdtype(waveform.dtype, np.floating):
        kind = (
            f"{waveform.dtype}{list(waveform.shape)}" if isinstance(waveform, np.ndarray) else type(waveform).__name__
        )
        raise ValueError(f"{name} must be a floating-point array of shape [N], samples from -1 to 1, got {kind}.")
    if not np.isfinite(waveform).all():
        raise ValueError(f"{name} must be finite, but holds NaN or infinity.")
    return waveform
