"""Loads a Whisper checkpoint: weights, settings and tokenizer."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from tokenizers import Tokenizer

from specsamp_jax._files import brief, read_json
from specsamp_jax.models import load_module
from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE
from specsamp_jax.models.whisper.model import Whisper
from specsamp_jax.models.whisper.settings import WhisperSettings, load_settings
from specsamp_jax.text.tokenizer_file import read_tokenizer


class Speech(NamedTuple):
    """A Whisper with its settings and tokenizer, for `transcribe`.

    Attributes:
      module: The model.
      settings: Its special tokens and rules.
      tokenizer: Converts its tokens to text.
    """

    module: Whisper
    settings: WhisperSettings
    tokenizer: Tokenizer


def load_speech(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    progress_fn: Callable[[int, int], Any] | None = None,
) -> Speech:
    """Returns the Whisper in the folder `path`.

    Args:
      path: A folder in Hugging Face's layout: the files that `load_module` reads, `generation_config.json`,
        `tokenizer.json` and, optionally, `preprocessor_config.json`.
      dtype: The dtype of the parameters and of the computation, whatever the dtype in the file.
      progress_fn: Called after each parameter with the numbers of weights loaded and of all.

    Raises:
      ValueError: A file is missing or broken, holds another model, or requires other features than `log_mel` computes.
    """
    path = Path(path)
    module = load_module(path, dtype=dtype, progress_fn=progress_fn)
    if not isinstance(module, Whisper):
        raise ValueError(f"{path} must hold a Whisper, got a {type(module).__name__}.")
    _check_features(path / "preprocessor_config.json", module)
    return Speech(module, load_settings(path, module.config), read_tokenizer(path / "tokenizer.json"))


def _check_features(file: Path, module: Whisper) -> None:
    """Compares the features of a checkpoint with those of `log_mel`; older checkpoints lack the file."""
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
            raise ValueError(f"{name} in {file} must be {value}, got {brief(values[name])}.")
