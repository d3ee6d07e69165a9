"""The Qwen family: Llama's block with biases (Qwen2) or with norms of queries and keys (Qwen3).

Source: Yang et al., 2024, arXiv 2407.10671; Yang et al., 2025, arXiv 2505.09388.
"""

import dataclasses
from typing import Any, ClassVar

from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Block, Decoder

_REQUIRED = {"hidden_act": ("silu",), "use_sliding_window": (False,), "quantization_config": (None,)}
# Without use_sliding_window these do nothing.
_OF_THE_WINDOW = frozenset({"sliding_window", "max_window_layers"})


@dataclasses.dataclass(frozen=True)
class Qwen2Config(DecoderConfig):
    """The sizes of a Qwen2 or Qwen2.5: those of `DecoderConfig`."""

    model_type: ClassVar = "qwen2"
    architecture: ClassVar = "Qwen2ForCausalLM"
    required: ClassVar = _REQUIRED
    unused: ClassVar = _OF_THE_WINDOW

    max_position_embeddings: int = 32768


class Qwen2(Decoder):
    """A Qwen2 or Qwen2.5: queries, keys and values have biases."""

    def make_block(self, **kwargs: Any) -> Block:
        """Returns one layer."""
        return Block(self.config, bias=True, **kwargs)


@dataclasses.dataclass(frozen=True)
class Qwen3Config(DecoderConfig):
    """The sizes of a Qwen3: those of `DecoderConfig`."""

    model_type: ClassVar = "qwen3"
    architecture: ClassVar = "Qwen3ForCausalLM"
    required: ClassVar = {**_REQUIRED, "attention_bias": (False,)}
    unused: ClassVar = _OF_THE_WINDOW

    head_dim: int | None = 128
    max_position_embeddings: int = 32768


class Qwen3(Decoder):
    """A Qwen3: each head's queries and keys are normed before they are rotated."""

    def make_block(self, **kwargs: Any) -> Block:
        """Returns one layer."""
        return Block(self.config, head_norms=True, **kwargs)
