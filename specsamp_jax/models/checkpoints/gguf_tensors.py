"""Tensors of a GGUF file under the names and in the order of Hugging Face's checkpoints, dequantized row by row."""

import contextlib
import functools
import importlib
import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from specsamp_jax._gguf import Header, Tensor

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Two norms before the MLP is added, and one after it.
_INNER_OF_FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}


class Quantized(NamedTuple):
    """A tensor of a GGUF file; like `Stored` of a safetensors file.

    Attributes:
      path: The file.
      dtype: The name of its quantization type.
      shape: The shape.
      start: The offset of its first byte in the file.
      row_bytes: The bytes of a row.
      dequantize: Makes float32 `[rows, columns]` of bytes `[rows, row_bytes]`.
      num_heads: Heads whose rows the file holds interleaved: the two halves of each head in turn. None: it does not.
      offset: Added to the values in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int
    dequantize: Callable[[np.ndarray], np.ndarray]
    num_heads: int | None = None
    offset: float = 0.0

    @property
    def numpy_dtype(self) -> np.dtype:
        """The NumPy dtype that holds the values: bfloat16 if they are quantized."""
        return np.dtype(_PLAIN.get(self.dtype, jnp.bfloat16))

    @property
    def kept_dtype(self) -> np.dtype:
        """The dtype of a parameter loaded from it."""
        return self.numpy_dtype

    @contextlib.contextmanager
    def mapped(self) -> Iterator[Any]:
        """The values in float32, by slices of rows, while the context lasts; the file is mapped into memory."""
        num_rows = self.shape[0] if len(self.shape) > 1 else 1
        begin = self.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        num_bytes = num_rows * self.row_bytes
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), self.start - begin + num_bytes, access=mmap.ACCESS_READ, offset=begin)
        raw = np.frombuffer(mapping, np.uint8, num_bytes, self.start - begin).reshape(num_rows, self.row_bytes)
        yield _Rows(self, raw)
        del raw, mapping


class _Rows:
    """Rows of a `Quantized` tensor, dequantized when a slice of them is taken."""

    def __init__(self, tensor: Quantized, raw: np.ndarray):
        self.tensor, self.raw = tensor, raw
        self.order = None
        if tensor.num_heads is not None:
            # Halves of a head side by side: row [head, half, i] is row [head, i, half] of the file.
            order = np.arange(len(raw)).reshape(tensor.num_heads, -1, 2)
            self.order = order.swapaxes(1, 2).ravel()

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        tensor = self.tensor
        if len(tensor.shape) == 1:
            values = tensor.dequantize(self.raw)[0, rows]
        else:
            values = tensor.dequantize(self.raw[rows if self.order is None else self.order[rows]])
        return values + np.float32(tensor.offset) if tensor.offset else values


def read_tensors(header: Header, config: Mapping[str, Any]) -> dict[str, Quantized]:
    """Returns the tensors of a GGUF file by their names in Hugging Face's checkpoints, without reading their values.

    Llama's queries and keys are stored with the halves of each head interleaved, and Gemma's norms with 1 added; both
    are undone. A tensor without such a name keeps that of the file.

    Args:
      header: The header of the file.
      config: The settings that `read_config` returns.

    Raises:
      ValueError: A tensor is of a type that cannot be dequantized, or lies outside the file; or the package gguf is not
        installed.
    """
    model_type, tensors = config["model_type"], {}
    offset = -1.0 if model_type.startswith("gemma") else 0.0
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    inner = _INNER if "blk.0.post_ffw_norm.weight" not in header.tensors else _INNER | _INNER_OF_FOUR_NORMS
    for name, tensor in header.tensors.items():
        entry = locate(header, name, tensor)
        part = name.split(".")[-2] if "." in name else ""
        if part.endswith("norm"):
            entry = entry._replace(offset=offset)
        elif model_type == "llama" and part in heads:
            if entry.shape[0] % (2 * heads[part]):
                raise ValueError(
                    f"{name} in {header.path} must have a number of rows that 2 x {heads[part]} heads divide, got "
                    f"{entry.shape[0]}."
                )
            entry = entry._replace(num_heads=heads[part])
        tensors[_renamed(name, inner)] = entry
    return tensors


def _renamed(name: str, inner: Mapping[str, str]) -> str:
    found = re.fullmatch(r"(?:blk\.(\d{1,9})\.)?(\w+)\.(weight|bias)", name)
    if found is None:
        return name
    layer, part, kind = found.groups()
    names = _OUTER if layer is None else inner
    return f"{'' if layer is None else f'model.layers.{layer}.'}{names[part]}.{kind}" if part in names else name


def locate(header: Header, name: str, tensor: Tensor) -> Quantized:
    """Returns a tensor with the function that dequantizes it, after a check that it lies within its file."""
    kind, block, block_bytes, dequantize = _quantization(tensor.kind)
    if dequantize is None:
        raise ValueError(
            f"{name} in {header.path} is of the quantization type {kind}, which the installed package gguf cannot "
            "dequantize."
        )
    if tensor.shape[-1] % block:
        raise ValueError(
            f"{name} in {header.path} must have rows of a multiple of {block} values, for its type is {kind}, got "
            f"{tensor.shape[-1]}."
        )
    row_bytes = tensor.shape[-1] // block * block_bytes
    end = tensor.start + math.prod(tensor.shape[:-1]) * row_bytes
    if end > header.size:
        raise ValueError(f"{header.path} is cut off: {name} ends at byte {end:,}, and the file has {header.size:,}.")
    return Quantized(header.path, kind, tensor.shape, tensor.start, row_bytes, dequantize)


@functools.lru_cache
def _quantization(number: int) -> tuple[str, int, int, Callable[[np.ndarray], np.ndarray] | None]:
    """Name of a quantization type, values and bytes of its blocks, and the function that dequantizes rows, if any."""
    try:
        constants, quants = importlib.import_module("gguf.constants"), importlib.import_module("gguf.quants")
    except ImportError:
        raise ValueError(
            "GGUF files are read with the package gguf, which is not installed: install specsamp[gguf]."
        ) from None
    try:
        kind = constants.GGMLQuantizationType(number)
        block, num_bytes = constants.GGML_QUANT_SIZES[kind]
        quants.dequantize(np.zeros((1, num_bytes), np.uint8), kind)
    except (KeyError, NotImplementedError, ValueError):
        return f"number {number}", 1, 1, None
    return kind.name, block, num_bytes, lambda rows: quants.dequantize(rows, kind)
