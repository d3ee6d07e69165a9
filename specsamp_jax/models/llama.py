"""The Llama family (Touvron et al., 2023, arXiv 2302.13971 and 2307.09288; Grattafiori et al., 2024, 2407.21783).

Its block is the one of the other families; what is its own are the settings it allows. Sheared-LLaMA (Xia et al.,
2023, arXiv 2310.06694) is a Llama. Mistral is one whose every layer has a window.
"""

import dataclasses
from typing import ClassVar

from specsamp_jax.models.checkpoints.slots import Slot as Slot
from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Decoder
from specsamp_jax.models.decoder import checkpoint_layout as checkpoint_layout

_REQUIRED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,), "quantization_config": (None,)}


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
    """The sizes of a Llama: those of `DecoderConfig`."""

    model_type: ClassVar = "llama"
    architecture: ClassVar = "LlamaForCausalLM"
    required: ClassVar = _REQUIRED


class Llama(Decoder):
    """A decoder-only transformer of the Llama shape.

    Attributes:
      config: The sizes.
      dtype: What it computes in, and what the cache is kept in. Norms, rotations and the softmax are computed
        in float32, and the logits are float32.

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


@dataclasses.dataclass(frozen=True)
class MistralConfig(DecoderConfig):
    """The sizes of a Mistral: those of `LlamaConfig`, and the window.

    Attributes:
      sliding_window: How many tokens each layer attends, itself included. None: all before it.
    """

    model_type: ClassVar = "mistral"
    architecture: ClassVar = "MistralForCausalLM"
    required: ClassVar = {"hidden_act": ("silu",), "quantization_config": (None,)}

    sliding_window: int | None = 4096

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        return (self.sliding_window,) * self.num_hidden_layers


class Mistral(Decoder):
    """A Llama whose layers attend `sliding_window` tokens (Jiang et al., 2023, arXiv 2310.06825).

    The cache keeps a slot for every position all the same: a window that rolled would lose what a rejected draft
    has overwritten.
    """
