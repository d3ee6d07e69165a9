"""The Gemma family (Gemma team, 2024, arXiv 2403.08295 and 2408.00118).

Embeddings times the root of their size, norms whose gain is 1 + weight, and a tanh-approximated GELU. Gemma 2 has a
norm on both sides of attention and MLP, windows in every other layer, and bounds on scores and logits.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specsamp_jax.models.cache import LayerCache
from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.decoder import Angles, Block, Decoder
from specsamp_jax.models.layers import RMSNorm

_REQUIRED = {
    # "gelu" in Gemma's first files means the approximation, too.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
}
_LAYERS = {"sliding_attention", "full_attention"}


@dataclasses.dataclass(frozen=True)
class GemmaConfig(DecoderConfig):
    """The sizes of a Gemma: those of `DecoderConfig`."""

    model_type: ClassVar = "gemma"
    architecture: ClassVar = "GemmaForCausalLM"
    required: ClassVar = _REQUIRED

    head_dim: int | None = 256
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 8192


class Gemma(Decoder):
    """A Gemma."""

    norm_offset: ClassVar[float] = 1.0

    def make_block(self, **kwargs: Any) -> Block:
        """Returns one layer."""
        return Block(self.config, activation_fn=jax.nn.gelu, norm_offset=self.norm_offset, **kwargs)

    def scale_embeddings(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns the embeddings times the root of their size, rounded to their own dtype as in training."""
        return x * jnp.asarray(self.config.hidden_size**0.5, x.dtype)


@dataclasses.dataclass(frozen=True)
class Gemma2Config(GemmaConfig):
    """The sizes of a Gemma 2: those of `GemmaConfig`, and these.

    Attributes:
      query_pre_attn_scalar: The scores are divided by its root.
      sliding_window: How many tokens a layer with a window attends, itself included.
      layer_types: "sliding_attention" or "full_attention" for each layer. None: in turn, a window first.
      attn_logit_softcapping: Bound of the scores; None: none.
      final_logit_softcapping: Bound of the logits; None: none.
    """

    model_type: ClassVar = "gemma2"
    architecture: ClassVar = "Gemma2ForCausalLM"

    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    attn_logit_softcapping: float | None = 50.0
    final_logit_softcapping: float | None = 30.0

    def __post_init__(self):
        super().__post_init__()
        types = self.layer_types
        if types is not None and not (len(types) == self.num_hidden_layers and set(types) <= _LAYERS):
            raise ValueError(
                f"layer_types must be one of {' and '.join(sorted(_LAYERS))} for each of {self.num_hidden_layers} "
                f"layers, got {types!r}."
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer."""
        alternating = [("sliding_attention", "full_attention")[i % 2] for i in range(self.num_hidden_layers)]
        types = alternating if self.layer_types is None else self.layer_types
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in types)


class Gemma2Block(Block):
    """One layer with four norms: what attention and MLP read is normed, and so is what they add."""

    post_attention_norm: RMSNorm
    post_mlp_norm: RMSNorm
    norm_tensors: ClassVar[dict[str, str]] = {
        "attention_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    }

    def __call__(
        self, x: Float[Array, "B T F"], positions: Int[Array, "B T"], angles: Angles, mask: Any, cache: Any
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the residual stream behind this layer, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x), positions, angles, mask, cache)
        x = x + self.post_attention_norm(attended)
        return x + self.post_mlp_norm(self.mlp(self.mlp_norm(x))), cache


class Gemma2(Gemma):
    """A Gemma 2.

    Layers with a window keep a slot for every position in the cache all the same, twice what they would need at
    the window's length and more beyond: a cache that rolled would lose what a rejected draft has overwritten.
    """

    config: Gemma2Config

    def make_block(self, **kwargs: Any) -> Block:
        """Returns one layer."""
        config = self.config
        return Gemma2Block(
            config,
            activation_fn=jax.nn.gelu,
            norm_offset=self.norm_offset,
            scale=config.query_pre_attn_scalar**-0.5,
            softcap=config.attn_logit_softcapping,
            **kwargs,
        )

    def cap_logits(self, logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """Returns `cap * tanh(logits / cap)`."""
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)
