"""Gemma, Gemma 2 and the text model of Gemma 3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder

_FULL, _SLIDING = "full_attention", "sliding_attention"


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


@dataclasses.dataclass(frozen=True)
class Gemma3Config(DecoderConfig):
    """Sizes of a Gemma 3 for text; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "gemma3_text"

    head_dim: int | None = 256
    rope_theta: float = 1_000_000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131_072
    _: dataclasses.KW_ONLY
    sliding_window: int | None = 4096
    rope_local_base_freq: float | None = 10_000.0
    query_pre_attn_scalar: int = 256

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Returns the config that a config.json describes; see `DecoderConfig.from_dict`.

        transformers 5 writes `rope_parameters` of the two types of layers apart.
        """
        rope = values.get("rope_parameters")
        if not isinstance(rope, Mapping) or not rope.keys() & {_FULL, _SLIDING}:
            return super().from_dict(values)
        local = rope.get(_SLIDING) or {}
        unscaled = isinstance(local, Mapping) and local.get("rope_type", "default") == "default"
        if rope.keys() - {_FULL, _SLIDING} or not unscaled or local.keys() - {"rope_type", "rope_theta"}:
            raise ValueError(
                f"rope_parameters must hold {_FULL} and {_SLIDING}, the latter without scaling, got {rope!r}; other "
                "forms are not supported."
            )
        flat = {**values, "rope_parameters": rope.get(_FULL) or {}}
        return super().from_dict(
            flat | ({"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {})
        )


class Gemma3(Decoder):
    """Gemma 3 for text (Gemma team, 2025, arXiv 2503.19786).

    A Gemma 2 with norms of each head's query and key in place of the soft cap of scores, and five layers with a
    sliding window, whose rotary frequencies have a base of their own, to each layer without one.
    """

    model_type: ClassVar[str] = "gemma3_text"
