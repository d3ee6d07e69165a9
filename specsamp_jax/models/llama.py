"""Llama and Mistral."""

import dataclasses
from typing import ClassVar

from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """Sizes of a Llama; the fields are those of `DecoderConfig`."""

    model_type: ClassVar[str] = "llama"


class Llama(Decoder):
    """Llama (Touvron et al., 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al., 2024, arXiv 2407.21783).

    Sheared-LLaMA (Xia et al., 2023, arXiv 2310.06694) has the same architecture.

    Attributes:
      config: The sizes.
      dtype: Dtype of the computation and of the cache. Norms, rotations and the softmax are computed in float32,
        and the logits are float32.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> config = LlamaConfig(32, 16, 48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
      >>> module = Llama(config, rngs=nnx.Rngs(0))
      >>> tokens, positions = jnp.array([[5, 7]]), jnp.array([[0, 1]])
      >>> logits, cache = module(tokens, positions, module.init_cache_fn(batch_size=1, max_length=8))
      >>> logits.shape
      (1, 2, 32)
    """

    model_type: ClassVar[str] = "llama"


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """Sizes of a Mistral; every layer attends the last `sliding_window` tokens."""

    model_type: ClassVar[str] = "mistral"

    sliding_window: int | None = 4096


class Mistral(Decoder):
    """Mistral (Jiang et al., 2023, arXiv 2310.06825): a Llama with a sliding window in every layer.

    The cache keeps one slot per position nevertheless: a rolling cache would lose the keys and values that a
    rejected draft has overwritten.
    """

    model_type: ClassVar[str] = "mistral"
