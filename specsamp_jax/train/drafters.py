"""Drafters before training: some layers of the target, or a smaller model of the same family and vocabulary."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax.models import DecoderConfig, Whisper, WhisperConfig
from specsamp_jax.models.decoder import Decoder

_MULTIPLE = 8  # of the features of the MLP


def spread_layers(num_layers: int, num_chosen: int) -> tuple[int, ...]:
    """Returns `num_chosen` layers at equal distances, the first and the last among them.

    Example:
      >>> spread_layers(6, 2), spread_layers(12, 4), spread_layers(6, 1)
      ((0, 5), (0, 4, 7, 11), (0,))
    """
    if not 1 <= num_chosen <= num_layers:
        raise ValueError(f"layers must be from 1 to {num_layers}, the target's number; got {num_chosen}.")
    return tuple(round(i * (num_layers - 1) / max(num_chosen - 1, 1)) for i in range(num_chosen))


def layers_of(target: Any, layers: Sequence[int]) -> Any:
    """Returns a drafter with copies of some layers of the target, and with its embeddings and last norm.

    A Whisper's drafter shares all but the layers with the target; a decoder's is a copy.

    Args:
      target: A decoder or a Whisper; of a Whisper, the layers are the decoder's.
      layers: Indices of the target's layers, in the drafter's order.

    Raises:
      ValueError: The target has no such layer, or none was asked for.
    """
    speech = isinstance(target, Whisper)
    old = (target.decoder if speech else target).blocks
    if not layers or not all(0 <= layer < len(old) for layer in layers):
        raise ValueError(f"layers must be indices from 0 to {len(old) - 1} of the target's layers, got {list(layers)}.")
    blocks = nnx.List([nnx.clone(old[layer]) for layer in layers])
    config = _with_layers(target.config, layers)
    # A module without weights, whose parts are then the target's.
    draft = nnx.eval_shape(lambda: type(target)(config, dtype=target.dtype, rngs=nnx.Rngs(0)))
    if speech:
        draft.encoder, decoder = target.encoder, draft.decoder
        decoder.vocabulary, decoder.positions = target.decoder.vocabulary, target.decoder.positions
        decoder.norm, decoder.blocks = target.decoder.norm, blocks
    else:
        draft.vocabulary, draft.norm, draft.blocks = nnx.clone(target.vocabulary), nnx.clone(target.norm), blocks
    return draft


def _with_layers(config: Any, layers: Sequence[int]) -> Any:
    if isinstance(config, WhisperConfig):
        return dataclasses.replace(config, decoder_layers=len(layers))
    types = None
    if "layer_types" in config.family.settings:
        pattern = config.layer_types or config.family.layer_types
        types = tuple(pattern[layer % len(pattern)] for layer in layers)
    return dataclasses.replace(config, num_hidden_layers=len(layers), layer_types=types)


def smaller_config(config: DecoderConfig, hidden_size: int, num_layers: int | None = None) -> DecoderConfig:
    """Returns the config of a narrower model with the same vocabulary and the same size of a head.

    Heads, features of the MLP and, unless `num_layers` says otherwise, layers shrink in proportion.

    Args:
      config: The target's.
      hidden_size: Features of the residual stream.
      num_layers: The number of layers.

    Raises:
      ValueError: Sizes of 0 or less, or larger than the target's.

    Example:
      >>> from specsamp_jax.models import LlamaConfig
      >>> small = smaller_config(LlamaConfig(32000, 512, 1376, 8, 8, 4), 128)
      >>> small.num_hidden_layers, small.num_attention_heads, small.num_key_value_heads, small.intermediate_size
      (2, 2, 1, 344)
    """
    if not 0 < hidden_size <= config.hidden_size:
        raise ValueError(f"hidden_size must be from 1 to {config.hidden_size}, the target's; got {hidden_size}.")
    if num_layers is not None and not 0 < num_layers <= config.num_hidden_layers:
        raise ValueError(f"layers must be from 1 to {config.num_hidden_layers}, the target's number; got {num_layers}.")
    factor = hidden_size / config.hidden_size
    num_heads = max(1, round(config.num_attention_heads * factor))
    most = max(1, round(config.num_key_value_heads * factor))
    layers = num_layers or max(1, round(config.num_hidden_layers * factor))
    types = config.layer_types
    return dataclasses.replace(
        config,
        hidden_size=hidden_size,
        intermediate_size=max(1, round(config.intermediate_size * factor / _MULTIPLE)) * _MULTIPLE,
        num_hidden_layers=layers,
        num_attention_heads=num_heads,
        num_key_value_heads=max(n for n in range(1, most + 1) if num_heads % n == 0),
        head_dim=config.head_size,
        layer_types=None if types is None else types[:layers],
    )


def config_of_ratio(module_type: type[Decoder], config: DecoderConfig, ratio: float) -> DecoderConfig:
    """Returns the `smaller_config` whose number of parameters is nearest to `ratio` times the target's.

    Raises:
      ValueError: A ratio outside (0, 1).
    """
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must be above 0 and below 1, the share of the target's parameters; got {ratio}.")
    wanted = ratio * num_parameters(module_type, config)
    step = config.head_size if config.hidden_size % config.head_size == 0 else _MULTIPLE
    sizes = [config] + [smaller_config(config, size) for size in range(step, config.hidden_size, step)]
    return min(sizes, key=lambda size: abs(math.log(num_parameters(module_type, size) / wanted)))


def num_parameters(module_type: type[Decoder], config: DecoderConfig) -> int:
    """Returns the number of parameters of a model."""
    # All layers are alike, so one and two of them tell the size of any number.
    one, two = (
        sum(
            leaf.size
            for leaf in jax.tree.leaves(nnx.state(nnx.eval_shape(lambda c=c: module_type(c, rngs=nnx.Rngs(0)))))
        )
        for c in (dataclasses.replace(config, num_hidden_layers=n, layer_types=None) for n in (1, 2))
    )
    return one + (config.num_hidden_layers - 1) * (two - one)


def new_drafter(target: Decoder, config: DecoderConfig, seed: int, dtype: DTypeLike) -> Decoder:
    """Returns a drafter with random weights, in float32, that computes in `dtype`."""
    return type(target)(config, dtype=dtype, param_dtype=jnp.float32, rngs=nnx.Rngs(seed))
