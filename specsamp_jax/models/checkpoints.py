"""Checkpoints in Hugging Face's layout: a folder with config.json and model.safetensors."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax._types import Model
from specsamp_jax.models import llama, whisper, whisper_checkpoint
from specsamp_jax.models.adapters import from_nnx

_CONFIG = "config.json"
_TENSORS = "model.safetensors"


class _Family(NamedTuple):
    """How a model type becomes a module, and where that one's parameters stand."""

    config: Any
    module: Any
    layout: Callable[[Any], Iterator[llama.Slot]]


_FAMILIES = {
    "llama": _Family(llama.LlamaConfig, llama.Llama, llama.checkpoint_layout),
    "whisper": _Family(whisper.WhisperConfig, whisper.Whisper, whisper_checkpoint.checkpoint_layout),
}


def save_checkpoint(path: str | os.PathLike[str], module: nnx.Module, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes `module` into the folder `path`, as the family's `from_pretrained` in transformers reads it.

    Args:
      path: The folder; made if it is not there. Files of the same names are replaced.
      module: The model.
      dtype: What the tensors are written in.
    """
    tensors = {}
    config = getattr(module, "config", None)
    layout = next((family.layout for family in _FAMILIES.values() if isinstance(module, family.module)), None)
    if config is None or layout is None:
        raise ValueError(f"module must be of a family that has checkpoints, got {type(module).__name__}.")
    for slot in layout(module):
        value = np.asarray(slot.param[...].astype(dtype))
        value = value.T if slot.transposed else value
        cuts = np.cumsum([shape[0] for shape in slot.tensors.values()])[:-1]
        for name, part in zip(slot.tensors, np.split(value, cuts), strict=True):
            tensors[name] = np.ascontiguousarray(part)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {**config.to_dict(), "dtype": jnp.dtype(dtype).name}
    (path / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    # transformers refuses a file that does not say which framework's tensors it holds.
    safetensors.numpy.save_file(tensors, path / _TENSORS, metadata={"format": "pt"})


def load_checkpoint(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Model:
    """Returns the model that the folder `path` holds, ready to decode.

    Args:
      path: A folder with `config.json` and `model.safetensors`, of the architecture LlamaForCausalLM.
      dtype: What the parameters are kept in and computed with, whatever the file holds.

    Raises:
      ValueError: A file is missing, broken or of another architecture; a tensor is missing, superfluous, of
        another shape than the config says, or no floating point. Nothing is loaded then.
    """
    module = load_module(path, dtype=dtype)
    if isinstance(module, whisper.Whisper):
        raise ValueError(
            f"{path} holds a Whisper, whose text follows speech: load_module and decoder_model are for it."
        )
    return from_nnx(module)


def load_module(path: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Any:
    """Returns the module that the folder `path` holds, to train it further; the rest is `load_checkpoint`."""
    path = Path(path)
    family, config = _read_config(path / _CONFIG)
    module = nnx.eval_shape(lambda: family.module(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)))
    slots = list(family.layout(module))
    shapes = {name: shape for slot in slots for name, shape in slot.tensors.items()}
    tensors = _read_tensors(path / _TENSORS, shapes)
    for slot in slots:
        value = np.concatenate([tensors.pop(name) for name in slot.tensors])
        slot.param.set_value(jnp.asarray(value.T if slot.transposed else value, dtype))
    return module


def _read_config(path: Path) -> tuple[_Family, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"A checkpoint must hold {path.name}, but there is no {path}.") from None
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object, but it cannot be parsed: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(values).__name__}.")
    model_type = values.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(map(repr, _FAMILIES))}, got {model_type!r}.")
    family = _FAMILIES[model_type]
    return family, family.config.from_dict(values)


def _read_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Returns the tensors of exactly these names and shapes, after all of them have been checked."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            for name in shapes:
                if name not in names:
                    raise ValueError(f"{path} must hold the tensor {name}, which is missing.")
            for name in sorted(names - set(shapes)):
                raise ValueError(f"{path} holds the tensor {name}, which this model does not have.")
            for name, shape in shapes.items():
                found = file.get_slice(name)
                if tuple(found.get_shape()) != shape:
                    raise ValueError(
                        f"{name} must have shape {shape} by the config, got {tuple(found.get_shape())} in {path}."
                    )
                if found.get_dtype() not in ("BF16", "F16", "F32", "F64"):
                    raise ValueError(f"{name} must be floating point, got {found.get_dtype()} in {path}.")
            return {name: file.get_tensor(name) for name in shapes}
    except FileNotFoundError:
        raise ValueError(f"A checkpoint must hold {path.name}, but there is no {path}.") from None
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error
