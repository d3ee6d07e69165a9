"""Checkpoints in Hugging Face's layout: a folder with config.json and safetensors files."""

import collections
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax._files import read_json
from specsamp_jax._types import Model
from specsamp_jax.models.adapters import from_nnx
from specsamp_jax.models.checkpoints.slots import Slot, fill
from specsamp_jax.models.checkpoints.tensors import Stored, read_headers
from specsamp_jax.models.decoder import Decoder, checkpoint_layout
from specsamp_jax.models.gemma import Gemma, Gemma2, Gemma2Config, GemmaConfig
from specsamp_jax.models.llama import Llama, LlamaConfig, Mistral, MistralConfig
from specsamp_jax.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from specsamp_jax.models.whisper import checkpoint as whisper_checkpoint
from specsamp_jax.models.whisper.model import Whisper, WhisperConfig

_CONFIG = "config.json"
_TENSORS = "model.safetensors"


class Family(NamedTuple):
    """One model type.

    Attributes:
      config: Has `from_dict` and `to_dict`, for config.json.
      module: Made as `module(config, dtype=, param_dtype=, rngs=)`; has `config` and `dtype`.
      layout: Yields a `Slot` for every parameter of a module.
    """

    config: Any
    module: Callable[..., Any]
    layout: Callable[[Any], Iterable[Slot]]


FAMILIES = {
    "llama": Family(LlamaConfig, Llama, checkpoint_layout),
    "mistral": Family(MistralConfig, Mistral, checkpoint_layout),
    "qwen2": Family(Qwen2Config, Qwen2, checkpoint_layout),
    "qwen3": Family(Qwen3Config, Qwen3, checkpoint_layout),
    "gemma": Family(GemmaConfig, Gemma, checkpoint_layout),
    "gemma2": Family(Gemma2Config, Gemma2, checkpoint_layout),
    "whisper": Family(WhisperConfig, Whisper, whisper_checkpoint.checkpoint_layout),
}
"""The families by `model_type` of config.json."""


def save_checkpoint(path: str | os.PathLike[str], module: Any, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes `module` into the folder `path`, as transformers' `from_pretrained` reads it.

    Args:
      path: The folder; made if it is not there. Files of the same names are replaced.
      module: A module of any family here.
      dtype: What the tensors are written in.

    Example:
      >>> import tempfile
      >>> module = Llama(LlamaConfig(32, 16, 48, 1, 2, 2), rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     save_checkpoint(folder, module)
      ...     sorted(path.name for path in Path(folder).iterdir())
      ...     load_checkpoint(folder).params["norm"]["weight"].dtype.name
      ['config.json', 'model.safetensors']
      'bfloat16'
    """
    family, tensors = FAMILIES[module.config.model_type], {}
    for slot in family.layout(module):
        value = np.asarray(slot.param[...].astype(dtype))
        value = value.T if slot.transposed else value
        cuts = np.cumsum([shape[0] for shape in slot.tensors.values()])[:-1]
        for name, part in zip(slot.tensors, np.split(value, cuts), strict=True):
            tensors[name] = np.ascontiguousarray(part)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {**module.config.to_dict(), "dtype": jnp.dtype(dtype).name}
    (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    # transformers refuses a file that does not say which framework's tensors it holds.
    safetensors.numpy.save_file(tensors, path / _TENSORS, metadata={"format": "pt"})


def load_checkpoint(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Model:
    """Returns the decoder-only model that the folder `path` holds, ready to decode.

    The weights are read by memory map, each parameter into one buffer that on a CPU is the parameter itself; so
    there are never more in memory than the model and, once more, its largest parameter. Llama 2 of 7 billion
    parameters in bfloat16 is 13.5 GB and its largest parameter 0.26, which fits a host of 24 GB.

    Args:
      path: A folder with `config.json` of a model type in `FAMILIES`, and `model.safetensors`, or its shards with
        `model.safetensors.index.json`.
      dtype: What the parameters are kept in and computed with. None: each parameter keeps the type that it has in
        the file, and it is computed in the type that most of the weights have.

    Raises:
      ValueError: A file is missing, broken or of another architecture; the config holds a setting that is not
        supported; a tensor is missing, superfluous, of another shape than the config says, or no floating
        point. Nothing is loaded then. `rotary_emb.inv_freq`, and `lm_head.weight` where the head is the
        embedding, are no superfluous tensors.
    """
    module = load_module(path, dtype=dtype)
    if not isinstance(module, Decoder):
        raise ValueError(f"{path} must hold a decoder-only model, got a {type(module).__name__}; see load_module.")
    return from_nnx(module)


def load_module(path: str | os.PathLike[str], *, dtype: DTypeLike | None = None) -> Any:
    """Returns the module that the folder `path` holds, such as a `Llama`; the rest is `load_checkpoint`."""
    path = Path(path)
    values = read_json(path / _CONFIG)
    family = FAMILIES.get(values.get("model_type", ""))
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise ValueError(
            f"model_type must be one of {known}, got {values.get('model_type')!r} in {path / _CONFIG}; "
            "other families cannot be loaded."
        )
    config = family.config.from_dict(values)
    stored = read_headers(path)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got {jnp.dtype(dtype)}.")
    compute = _most_common(stored) if dtype is None else dtype
    module = nnx.eval_shape(lambda: family.module(config, dtype=compute, param_dtype=compute, rngs=nnx.Rngs(0)))
    fill(list(family.layout(module)), stored, dtype)
    return module


def _most_common(stored: dict[str, Stored]) -> np.dtype:
    """The type of most of the weights; float64 is float32."""
    counts = collections.Counter()
    for entry in stored.values():
        if entry.numpy_dtype is not None:
            counts[entry.kept_dtype] += math.prod(entry.shape)
    return counts.most_common(1)[0][0] if counts else np.dtype(np.float32)
