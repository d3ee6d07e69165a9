"""Gemma and Gemma 2."""

import dataclasses
from typing import ClassVar

from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    """Sizes of a Gemma; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "gemma"

    head_dim: int | None = 256
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192


class Gemma(Decoder):
    """Gemma (Gemma team, 2024, arXiv 2403.08295).

    Embeddings are multiplied by the square root of their size, the gain of a norm is 1 + weight, and the gate's
    activation is GELU in its tanh approximation.
    """

    model_type: ClassVar[str] = "gemma"


@dataclasses.dataclass(frozen=True)
class Gemma2Config(DecoderConfig):
    """Sizes of a Gemma 2; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "gemma2"

    head_dim: int | None = 256
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192
    _: dataclasses.KW_ONLY
    sliding_window: int | None = 4096
    query_pre_attn_scalar: int = 256
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0


class Gemma2(Decoder):
    """Gemma 2 (Gemma team, 2024, arXiv 2408.00118).

    A Gemma with a norm before and after attention and MLP, a sliding window in every other layer, and soft caps on
    scores and logits. Layers with a window keep one slot per position in the cache nevertheless: a rolling cache
    would lose the keys and values that a rejected draft has overwritten.
    """

    model_type: ClassVar[str] = "gemma2"
