"""A folder with a Whisper in it: its weights, its settings, its tokenizer."""

import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from specsamp_jax._files import read_json
from specsamp_jax.models import load_module
from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE
from specsamp_jax.models.whisper.model import Whisper
from specsamp_jax.models.whisper.settings import WhisperSettings, load_settings


class Speech(NamedTuple):
    """What speech is transcribed with.

    Attributes:
      module: The model.
      settings: How it is asked.
      tokenizer: Turns its tokens into text.
    """

    module: Whisper
    settings: WhisperSettings
    tokenizer: Tokenizer


def load_speech(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Speech:
    """Returns the Whisper that the folder `path` holds.

    Args:
      path: A folder in Hugging Face's layout: what `load_module` reads, `generation_config.json`, `tokenizer.json`,
        and, if it is there, `preprocessor_config.json`.
      dtype: What the parameters are kept in and computed with, whatever the file holds.

    Raises:
      ValueError: A file is missing or broken, holds another model, or asks for other features than `log_mel` makes.
    """
    path = Path(path)
    module = load_module(path, dtype=dtype)
    if not isinstance(module, Whisper):
        raise ValueError(f"{path} must hold a Whisper, got a {type(module).__name__}.")
    _check_features(path / "preprocessor_config.json", module)
    return Speech(module, load_settings(path, module.config), _read_tokenizer(path / "tokenizer.json"))


def _read_tokenizer(file: Path) -> Tokenizer:
    if not file.exists():
        raise ValueError(f"A Whisper checkpoint must hold {file.name}, but there is no {file}.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file} is no tokenizer that the tokenizers library reads: {error}.") from error


def _check_features(file: Path, module: Whisper) -> None:
    """Older folders may lack the file; then the config alone says how many filters there are."""
    values = read_json(file, required=False)
    expected = {
        "feature_size": module.config.num_mel_bins,
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP,
        "n_fft": 400,
        "chunk_length": module.config.num_frames * HOP // SAMPLE_RATE,
        "dither": 0.0,
    }
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"{name} in {file} must be {value}, got {values[name]!r}.")
