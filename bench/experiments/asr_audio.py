"""Sound of the speech experiment: WAV files, packs of Ogg Opus, noise and the telephone.

Needs NumPy and SciPy; packs need soundfile with libsndfile 1.2.
"""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import signal
from scipy.io import wavfile

RATE = 16_000
QUIETEST = 1e-4  # the root mean square below which a sound counts as silence


class Utterance(NamedTuple):
    """A sound and its text.

    Attributes:
      name: A unique name, also that of its file.
      text: The text that was spoken.
      group: The set that it belongs to, or the voice.
      noise: The signal-to-noise ratio in dB, or "clean".
    """

    name: str
    text: str
    group: str
    noise: str


def to_rate(samples: np.ndarray, rate: int) -> np.ndarray:
    """Returns int16 or float samples at 16,000 per second, float32 from -1 to 1."""
    floats = samples.astype(np.float64) / (32768 if samples.dtype == np.int16 else 1)
    divisor = np.gcd(rate, RATE)
    return signal.resample_poly(floats, RATE // divisor, rate // divisor).astype(np.float32)


def read_wav(path: Path) -> np.ndarray:
    """Returns a mono WAV file of int16 at 16,000 samples per second."""
    rate, samples = wavfile.read(path)
    return to_rate(samples, rate)


def write_wav(path: Path, waveform: np.ndarray) -> None:
    """Writes int16 samples, scaled down if they would clip."""
    scaled = waveform / max(1.0, np.abs(waveform).max())
    wavfile.write(path, RATE, np.round(scaled * 32767).astype(np.int16))


def add_noise(rng: np.random.Generator, waveform: np.ndarray, decibels: float) -> np.ndarray:
    """Adds noise whose spectrum falls by 0, 3 or 6 dB an octave, at a signal-to-noise ratio.

    The signal's power is that of its loudest half second blocks, so that pauses do not count.
    """
    spectrum = np.fft.rfft(rng.standard_normal(waveform.size))
    spectrum /= np.maximum(np.arange(spectrum.size), 20) ** rng.choice([0.0, 0.5, 1.0])
    noise = np.fft.irfft(spectrum, waveform.size)
    blocks = np.array_split(waveform, max(1, waveform.size // (RATE // 2)))
    powers = np.sort([np.mean(block**2) for block in blocks])
    power = np.mean(powers[len(powers) // 2 :])
    return (waveform + noise * np.sqrt(power / 10 ** (decibels / 10) / np.mean(noise**2))).astype(np.float32)


def telephone(waveform: np.ndarray) -> np.ndarray:
    """Returns the sound after a telephone line: 300 to 3,400 Hz, 8,000 samples per second, 8 bits by the mu law."""
    narrow = signal.resample_poly(waveform, 1, 2)
    narrow = signal.sosfilt(signal.butter(4, (300, 3400), "bandpass", fs=RATE // 2, output="sos"), narrow)
    narrow = np.clip(narrow, -1, 1)
    coded = np.round(np.sign(narrow) * np.log1p(255 * np.abs(narrow)) / np.log(256) * 127) / 127
    decoded = np.sign(coded) * np.expm1(np.abs(coded) * np.log(256)) / 255
    return signal.resample_poly(decoded, 2, 1)[: waveform.size].astype(np.float32)


def degrade(rng: np.random.Generator, waveform: np.ndarray) -> np.ndarray:
    """Returns the sound under a random channel: level, and for most, noise of 3 to 30 dB, the telephone, or both."""
    waveform = waveform * (10 ** rng.uniform(-1, 0) / max(np.abs(waveform).max(), QUIETEST))
    if rng.random() < 0.6:
        waveform = add_noise(rng, waveform, rng.uniform(3, 30))
    return telephone(waveform) if rng.random() < 0.5 else waveform.astype(np.float32)


def write_pack(path: Path, items: Sequence[tuple[Utterance, np.ndarray]], quality: float) -> None:
    """Writes a zip of Ogg Opus files with transcripts.tsv; `quality` from 0 to 1 falls with the bit rate."""
    import soundfile  # pyright: ignore[reportMissingImports]

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as pack:
        pack.writestr("transcripts.tsv", table([utterance for utterance, _ in items]))
        for utterance, waveform in items:
            content = io.BytesIO()
            soundfile.write(content, waveform, RATE, format="OGG", subtype="OPUS", compression_level=quality)
            pack.writestr(f"{utterance.name}.ogg", content.getvalue())


def table(utterances: Sequence[Utterance]) -> str:
    """Returns the lines of transcripts.tsv."""
    return "".join("\t".join(row) + "\n" for row in [Utterance("id", "text", "set", "noise"), *utterances])


def read_table(text: str) -> list[Utterance]:
    """Returns the utterances of a transcripts.tsv."""
    return [Utterance(*line.split("\t")) for line in text.splitlines()[1:]]


def read_pack(path: Path) -> Iterator[tuple[Utterance, bytes]]:
    """Yields the utterances of a pack with their Ogg files; `decode` reads those."""
    with zipfile.ZipFile(path) as pack:
        for utterance in read_table(pack.read("transcripts.tsv").decode()):
            yield utterance, pack.read(f"{utterance.name}.ogg")


def decode(content: bytes) -> np.ndarray:
    """Returns the sound of an Ogg file."""
    import soundfile  # pyright: ignore[reportMissingImports]

    samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    return to_rate(samples, rate)
