"""Reads sound files of any kind: WAV here, the others with the package soundfile, the extra `audio`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from specsamp_jax.models.whisper.features import checked
from specsamp_jax.speech.audio import check_rate, parse_wav, read_sound, resample

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3")
"""Names of sound files in a folder end with these."""

# A compressed file of silence may be thousands of times smaller than its samples: 4 GiB in float32.
_MAX_SAMPLES = 1 << 30


def load_audio(path: str | os.PathLike[str]) -> Float[np.ndarray, "N"]:
    """Returns the sound of a file, float32, its channels averaged, at 16,000 samples per second.

    Args:
      path: A WAV file, as in `load_wav`, or FLAC, Ogg (Vorbis or Opus) or MP3, which the package soundfile reads.

    Raises:
      ValueError: There is no such file, it is no regular file, is no sound, or soundfile is not installed.
    """
    path = Path(path)
    content = read_sound(path)
    if content[:4] == b"RIFF":
        return parse_wav(path, content)
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: its library is missing
        raise ValueError(
            f"{path} is no WAV file. FLAC, Ogg and MP3 need the package soundfile, which cannot be imported ({error}): "
            "install specsamp[audio], or convert the file to WAV."
        ) from None
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, num_samples = file.samplerate, file.frames * file.channels
            check_rate(path, rate)
            if not 0 < num_samples <= _MAX_SAMPLES:
                raise ValueError(f"{path} must hold from 1 to {_MAX_SAMPLES:,} samples, got {num_samples:,}.")
            samples = file.read(dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        # The text of a LibsndfileError also names the object that was read, with its address.
        reason = getattr(error, "error_string", str(error)).rstrip(".")
        raise ValueError(f"{path} must be WAV, FLAC, Ogg or MP3, but soundfile cannot read it: {reason}.") from None
    return resample(checked(str(path), samples.mean(1, dtype=np.float32)), rate)


def find_sounds(paths: Sequence[Path]) -> list[Path]:
    """Returns the files among the paths, and in place of each folder its sound files in the order of their names.

    Raises:
      ValueError: A folder holds no file whose name ends with one of `SUFFIXES`.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
        if not files:
            raise ValueError(
                f"{path} must hold sound files, whose names end with {', '.join(SUFFIXES)}; it holds none."
            )
        found += files
    return found
