"""The table of decoder families: everything in which they differ, apart from sizes.

A new family is a new entry here, with its defaults in a subclass of `DecoderConfig`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax


class Family(NamedTuple):
    """Architecture of one family, and which config.json files describe it.

    Attributes:
      architecture: Name of the class in transformers.
      required: Settings that config.json must hold with one of these values, if it holds them. The first is written.
      ignored: Settings without effect while those in `required` have their values.
      settings: Fields of `DecoderConfig` that this family has and others lack; in the others they are None.
      layer_types: Attention type of each layer, repeated over all layers; see `DecoderConfig.layer_types`.
      qkv_bias: Whether queries, keys and values have biases.
      head_norms: Whether the query and key of each head are normed before they are rotated.
      post_norms: Whether the outputs of attention and MLP are normed before they are added to the residual stream.
      norm_offset: Added to the weight of each norm.
      scaled_embeddings: Whether embeddings are multiplied by the square root of `hidden_size`.
      activation_fn: Activation of the MLP's gate.
    """

    architecture: str
    required: Mapping[str, tuple[Any, ...]]
    ignored: frozenset[str] = frozenset()
    settings: frozenset[str] = frozenset()
    layer_types: tuple[str, ...] = ("full_attention",)
    qkv_bias: bool = False
    head_norms: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    scaled_embeddings: bool = False
    activation_fn: Callable[[jax.Array], jax.Array] = jax.nn.silu


_LLAMA = {"hidden_act": ("silu",), "quantization_config": (None,)}
_QWEN = {**_LLAMA, "use_sliding_window": (False,)}
# Without use_sliding_window these have no effect.
_QWEN_IGNORED = frozenset({"sliding_window", "max_window_layers"})
_GEMMA = {
    # The first files of Gemma say "gelu" and mean the approximation as well.
    "hidden_act": ("gelu_pytorch_tanh", "gelu"),
    "hidden_activation": ("gelu_pytorch_tanh", None),
    "attention_bias": (False,),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        required={**_LLAMA, "attention_bias": (False,), "mlp_bias": (False,)},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        required=_LLAMA,
        settings=frozenset({"sliding_window"}),
        layer_types=("sliding_attention",),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        required=_QWEN,
        ignored=_QWEN_IGNORED,
        qkv_bias=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        required={**_QWEN, "attention_bias": (False,)},
        ignored=_QWEN_IGNORED,
        head_norms=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        required=_GEMMA,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation_fn=jax.nn.gelu,
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        required=_GEMMA,
        settings=frozenset(
            {
                "sliding_window",
                "layer_types",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "final_logit_softcapping",
            }
        ),
        layer_types=("sliding_attention", "full_attention"),
        post_norms=True,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation_fn=jax.nn.gelu,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        # transformers reads no soft cap of the scores; files state the pattern of layers that is the default.
        required={**_GEMMA, "attn_logit_softcapping": (None,), "sliding_window_pattern": (6,)},
        settings=frozenset(
            {
                "sliding_window",
                "layer_types",
                "rope_local_base_freq",
                "query_pre_attn_scalar",
                "final_logit_softcapping",
            }
        ),
        layer_types=("sliding_attention",) * 5 + ("full_attention",),
        head_norms=True,
        post_norms=True,
        norm_offset=1.0,
        scaled_embeddings=True,
        activation_fn=jax.nn.gelu,
    ),
}
"""Families by `model_type` of config.json."""
