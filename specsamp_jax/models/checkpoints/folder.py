"""Checkpoints: a folder in Hugging Face's layout, with config.json and safetensors files, or a GGUF file."""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax._files import OBJECT, TEXT, TEXT_LIST, brief, check_format, read_json, read_setting
from specsamp_jax._gguf import is_gguf, read_gguf
from specsamp_jax._hub import find_checkpoint
from specsamp_jax._types import Model
from specsamp_jax.models.adapters import from_nnx
from specsamp_jax.models.checkpoints import gemma3, gguf_config, gguf_tensors
from specsamp_jax.models.checkpoints.in_file import leave_in_file
from specsamp_jax.models.checkpoints.slots import (
    Ahead,
    Slot,
    check,
    check_present,
    check_shapes,
    copy_ahead,
    fill,
    loaded_dtype,
    most_common_dtype,
)
from specsamp_jax.models.checkpoints.tensors import Stored, read_headers
from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder, checkpoint_layout
from specsamp_jax.models.gemma import Gemma, Gemma2, Gemma2Config, Gemma3, Gemma3Config, GemmaConfig
from specsamp_jax.models.llama import Llama, LlamaConfig, Mistral, MistralConfig
from specsamp_jax.models.qwen import Qwen2, Qwen2Config, Qwen3, Qwen3Config
from specsamp_jax.models.whisper import checkpoint as whisper_checkpoint
from specsamp_jax.models.whisper.model import Whisper, WhisperConfig

_CONFIG = "config.json"
_TENSORS = "model.safetensors"


class Family(NamedTuple):
    """A model type.

    Attributes:
      config: The class of its configs, with `from_dict` and `to_dict` for config.json.
      module: The class of its modules, called as `module(config, dtype=, param_dtype=, rngs=)`.
      layout: Yields a `Slot` for every parameter of a module.
      num_layers: Returns the layers that a config asks for: setting, prefix of their tensors, and number.
      computed: Returns the tensors that a new module computes instead of drawing them, with their shapes.
    """

    config: Any
    module: Callable[..., Any]
    layout: Callable[[Any], Iterable[Slot]]
    num_layers: Callable[[Any], list[tuple[str, str, int]]]
    computed: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}


def _decoder_layers(config: DecoderConfig) -> list[tuple[str, str, int]]:
    return [("num_hidden_layers", "model.layers.", config.num_hidden_layers)]


def _whisper_layers(config: WhisperConfig) -> list[tuple[str, str, int]]:
    return [
        ("encoder_layers", "model.encoder.layers.", config.encoder_layers),
        ("decoder_layers", "model.decoder.layers.", config.decoder_layers),
    ]


def _whisper_computed(config: WhisperConfig) -> dict[str, tuple[int, ...]]:
    return {"model.encoder.embed_positions.weight": (config.max_source_positions, config.d_model)}


FAMILIES = {
    "llama": Family(LlamaConfig, Llama, checkpoint_layout, _decoder_layers),
    "mistral": Family(MistralConfig, Mistral, checkpoint_layout, _decoder_layers),
    "qwen2": Family(Qwen2Config, Qwen2, checkpoint_layout, _decoder_layers),
    "qwen3": Family(Qwen3Config, Qwen3, checkpoint_layout, _decoder_layers),
    "gemma": Family(GemmaConfig, Gemma, checkpoint_layout, _decoder_layers),
    "gemma2": Family(Gemma2Config, Gemma2, checkpoint_layout, _decoder_layers),
    "gemma3_text": Family(Gemma3Config, Gemma3, checkpoint_layout, _decoder_layers),
    "whisper": Family(WhisperConfig, Whisper, whisper_checkpoint.checkpoint_layout, _whisper_layers, _whisper_computed),
}
"""The families by `model_type` of config.json."""

_LARGEST = 2**53  # beyond it a whole number has no float64; no setting of config.json comes near


def save_checkpoint(path: str | os.PathLike[str], module: Any, *, dtype: DTypeLike = jnp.bfloat16) -> None:
    """Writes `module` into the folder `path`, in the layout that transformers' `from_pretrained` reads.

    Args:
      path: The folder; created if it does not exist. Files of the same names are replaced.
      module: A module of any family in `FAMILIES`.
      dtype: The dtype of the tensors in the file.

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
    # transformers refuses a file whose metadata does not name a framework.
    safetensors.numpy.save_file(tensors, path / _TENSORS, metadata={"format": "pt"})


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    progress_fn: Callable[[int, int], Any] | None = None,
) -> Model:
    """Returns the decoder-only model that the folder or GGUF file `path` holds, ready to decode.

    The weights are read by memory map in several threads, each parameter into a buffer that becomes the parameter
    itself on a CPU. Elsewhere up to three parameters are on the host at once: of Llama 2 7B in bfloat16 0.6 GB.

    Args:
      path: A folder with `config.json` of a model type in `FAMILIES`, and `model.safetensors`, or its shards with
        `model.safetensors.index.json`; or a GGUF file of an architecture in `gguf_config.MODEL_TYPES`, for which the
        extra `gguf` must be installed; or, where no such folder is, the id of a model of the Hugging Face hub.
      dtype: The dtype of the parameters and of the computation. None: each parameter keeps its dtype in the file
        (bfloat16 if it is quantized there), and the computation uses the dtype of most of the weights.
      progress_fn: Called after each parameter with the numbers of weights loaded and of all.

    Raises:
      ValueError: A file is missing, broken, no regular file or of another architecture; the config holds a setting
        that is not supported; a tensor is missing, unexpected, of another shape than the config requires, or not
        floating point. Nothing is loaded in that case. The tensors `rotary_emb.inv_freq`, and `lm_head.weight` if
        the head is the embedding, are allowed and not read.
    """
    return open_checkpoint(path, dtype=dtype).load(progress_fn)


def _adapt(module: Any, path: str | os.PathLike[str]) -> Model:
    if not isinstance(module, Decoder):
        raise ValueError(f"{path} must hold a decoder-only model, got a {type(module).__name__}; see load_module.")
    return from_nnx(module)


def load_module(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    progress_fn: Callable[[int, int], Any] | None = None,
) -> Any:
    """Returns the module that `path` holds, such as a `Llama`; otherwise like `load_checkpoint`."""
    return open_checkpoint(path, dtype=dtype).load_module(progress_fn)


@runtime_checkable
class TouchedMemory(Protocol):
    """Memory that was touched before JAX was imported; `specsamp.TouchedMemory` is one."""

    def take(self, num_bytes: int) -> memoryview | None:
        """Returns writable memory of this size at a multiple of 64 bytes; None if less is left."""
        ...

    def release(self) -> None:
        """Frees the memory that was not taken."""
        ...


class Checkpoint(NamedTuple):
    """A checkpoint whose weights are not read yet.

    Attributes:
      path: The folder or GGUF file.
      config: The settings of config.json.
      dtype: The dtype of the parameters; None keeps that of the file.
      module: The module, without weights.
      slots: Its parameters.
      stored: The tensors of the file by name.
      ahead: Parameters that are copied already, from `begin_all`.
    """

    path: Path
    config: dict[str, Any]
    dtype: DTypeLike | None
    module: Any
    slots: list[Slot]
    stored: Mapping[str, Stored | gguf_tensors.Quantized]
    ahead: Ahead | None = None

    def shapes(self) -> Model:
        """Returns the model with shapes and dtypes (`jax.ShapeDtypeStruct`) in place of its weights.

        Raises:
          ValueError: As in `load_checkpoint`.
        """
        check(self.slots, self.stored)
        for slot in self.slots:
            dtype = loaded_dtype(slot, self.stored, self.dtype)
            slot.param.set_value(jax.ShapeDtypeStruct(slot.shape, dtype))
        return _adapt(self.module, self.path)

    def load_module(self, progress_fn: Callable[[int, int], Any] | None = None) -> Any:
        """Returns the result of `load_module`, and raises its errors."""
        fill(self.slots, self.stored, self.dtype, progress_fn, self.ahead)
        return self.module

    def load(self, progress_fn: Callable[[int, int], Any] | None = None) -> Model:
        """Returns the result of `load_checkpoint`, and raises its errors."""
        return _adapt(self.load_module(progress_fn), self.path)


def open_checkpoint(
    path: str | os.PathLike[str], *, dtype: DTypeLike | None = None, rows_in_file: bool = False
) -> Checkpoint:
    """Reads the config and the shapes of a checkpoint; arguments and errors are those of `load_checkpoint`.

    With `rows_in_file`, on a CPU, an embedding that is not the head stays in its file: see `in_file.leave_in_file`.
    """
    path = find_checkpoint(path)
    values, source = read_config(path), path if is_gguf(path) else path / _CONFIG
    family = FAMILIES.get(values.get("model_type") or "")
    if family is None:
        families = ", ".join(map(repr, FAMILIES))
        raise ValueError(
            f"model_type must be one of {families}, got {brief(values.get('model_type'))} in {source}; "
            "other families cannot be loaded."
        )
    try:
        config = family.config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    stored = _read_tensors(path, values)
    for setting, prefix, num_layers in family.num_layers(config):
        _check_layers(source, setting, num_layers, prefix, stored)
    computed = family.computed(config)
    check_present(computed, stored)
    check_shapes(computed, stored)
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be floating point, got {jnp.dtype(dtype)}.")
    compute = most_common_dtype(stored) if dtype is None else dtype
    module = nnx.eval_shape(lambda: family.module(config, dtype=compute, param_dtype=compute, rngs=nnx.Rngs(0)))
    slots = list(family.layout(module))
    if rows_in_file and jax.default_backend() == "cpu":
        slots = [leave_in_file(slot, stored, dtype) if slot.read_by_row else slot for slot in slots]
    return Checkpoint(path, values, dtype, module, slots, stored)


def begin_all(checkpoints: Sequence[Checkpoint], memory: TouchedMemory | None = None) -> list[Checkpoint]:
    """Starts a thread for each checkpoint, which copies up to half of its weights until the checkpoint is loaded.

    It shortens a later `load` by most of the time between the two, on a CPU. Elsewhere nothing is copied, because the
    buffers are not the parameters there. What is not taken of `memory` is released.

    Raises:
      ValueError: As in `load_checkpoint`.
    """
    options = {} if memory is None else {"take_fn": memory.take}
    if jax.default_backend() == "cpu":
        checkpoints = [
            each._replace(ahead=copy_ahead(each.slots, each.stored, each.dtype, **options)) for each in checkpoints
        ]
    if memory is not None:
        memory.release()
    return list(checkpoints)


def _read_tensors(path: Path, values: Mapping[str, Any]) -> Mapping[str, Stored | gguf_tensors.Quantized]:
    if is_gguf(path):
        return gguf_tensors.read_tensors(read_gguf(path), values)
    stored = read_headers(path)
    return gemma3.text_tensors(stored) if values["model_type"] == gemma3.TEXT_TYPE else stored


def read_config(path: Path) -> dict[str, Any]:
    """Returns the settings of config.json in a folder, or those that a GGUF file states, with their types checked."""
    values = gguf_config.read_config(read_gguf(path)) if is_gguf(path) else read_json(path / _CONFIG)
    check_format(path, values)
    if values.get("model_type") == gemma3.TYPE:
        values = gemma3.text_settings(values, path / _CONFIG)
    _check_types(values, path if is_gguf(path) else path / _CONFIG)
    return values


def _check_types(values: Mapping[str, Any], file: Path) -> None:
    """Checks the types that the configs take for granted, and that numbers are of a usable size."""
    read_setting(values, "model_type", TEXT, source=file)
    read_setting(values, "layer_types", TEXT_LIST, source=file)
    for name in ("rope_scaling", "rope_parameters"):
        rope = read_setting(values, name, OBJECT, source=file, default={})
        for kind in ("rope_type", "type"):
            read_setting(rope, kind, TEXT, source=file)
        for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
            _check_numbers(part, file)
    _check_numbers(values, file)


def _check_numbers(values: Mapping[str, Any], file: Path) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not -_LARGEST <= value <= _LARGEST:
            raise ValueError(f"{name} in {file} must be a number of at most 2**53 in size, got {brief(value)}.")


def _check_layers(file: Path, setting: str, num_layers: int, prefix: str, stored: Mapping[str, Any]) -> None:
    """Compares a number of layers with the tensors stored, before a layer is built: building many takes forever."""
    layer = re.compile(re.escape(prefix) + r"(\d{1,9})\.")
    indices = {int(found[1]) for found in map(layer.match, stored) if found}
    if num_layers > len(indices):
        raise ValueError(
            f"{setting} in {file} is {num_layers}, but the weights have tensors of {len(indices)} layers, named "
            f"{prefix}0 and so on."
        )
