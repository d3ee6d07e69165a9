"""Qwen2 and Qwen3."""

import dataclasses
from typing import ClassVar

from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """Sizes of a Qwen2 or Qwen2.5; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "qwen2"

    max_position_embeddings: int = 32768


class Qwen2(Decoder):
    """Qwen2 and Qwen2.5 (Yang et al., 2024, arXiv 2407.10671): queries, keys and values have biases."""

    model_type: ClassVar[str] = "qwen2"


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """Sizes of a Qwen3; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "qwen3"

    head_dim: int | None = 128
    max_position_embeddings: int = 32768


class Qwen3(Decoder):
    """Qwen3 (Yang et al., 2025, arXiv 2505.09388): each head's query and key are normed before they are rotated."""

    model_type: ClassVar[str] = "qwen3"
