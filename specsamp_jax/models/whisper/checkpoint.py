"""Tensor names of Whisper's parameters in a checkpoint, and a comparison of two encoders."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from specsamp_jax.models.checkpoints.slots import Slot, vocabulary_layout
from specsamp_jax.models.whisper.layers import LayerNorm, PartlyBiasedLinear
from specsamp_jax.models.whisper.model import DecoderBlock, EncoderBlock, Whisper

_ENCODER_SIZES = (
    "num_mel_bins",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "max_source_positions",
)


def share_encoder(target: Whisper, draft: Whisper) -> str | None:
    """Replaces the encoder of `draft` by that of `target` if both are equal, so that it runs and is stored once.

    Returns:
      None if they are equal, else the first difference, and `draft` is unchanged.
    """
    if draft.encoder is target.encoder:
        return None
    difference = encoder_difference(target, draft)
    if difference is None:
        draft.encoder = target.encoder
    return difference


def encoder_difference(first: Whisper, second: Whisper) -> str | None:
    """Returns the first difference between two encoders, a size or a tensor; None if they are equal.

    Sizes are compared first, then tensors bit by bit.
    """
    for name in _ENCODER_SIZES:
        if getattr(first.config, name) != getattr(second.config, name):
            return name
    if first.dtype != second.dtype:
        return "dtype"
    for slot, other in zip(_encoder_layout(first), _encoder_layout(second), strict=True):
        if not _same(slot.param[...], other.param[...]):
            return next(iter(slot.tensors))
    return None


_same = jax.jit(jnp.array_equal)


def checkpoint_layout(module: Whisper) -> Iterator[Slot]:
    """Yields every parameter of `module` with its tensors in Hugging Face's `WhisperForConditionalGeneration`."""
    yield from _encoder_layout(module)
    config, decoder = module.config, module.decoder
    yield from vocabulary_layout(decoder.vocabulary, "model.decoder.embed_tokens.weight", "proj_out.weight")
    size = (config.max_target_positions, config.d_model)
    yield Slot(decoder.positions, {"model.decoder.embed_positions.weight": size})
    for i, block in enumerate(decoder.blocks):
        layer = f"model.decoder.layers.{i}."
        yield from _norm(block.cross_norm, layer + "encoder_attn_layer_norm")
        cross, attention = block.cross, layer + "encoder_attn."
        yield from _affine(cross.query, config.d_model, attention, "q_proj")
        yield from _affine(cross.value_key, config.d_model, attention, "v_proj", "k_proj")
        yield from _affine(cross.out, config.d_model, attention, "out_proj")
        yield from _block(block, config.d_model, config.decoder_ffn_dim, layer)
    yield from _norm(decoder.norm, "model.decoder.layer_norm")


def _encoder_layout(module: Whisper) -> Iterator[Slot]:
    config, encoder = module.config, module.encoder
    for name, conv, width in (("conv1", encoder.conv1, config.num_mel_bins), ("conv2", encoder.conv2, config.d_model)):
        yield Slot(conv.kernel, {f"model.encoder.{name}.weight": (config.d_model, width, 3)}, transposed=True)
        assert conv.bias is not None
        yield Slot(conv.bias, {f"model.encoder.{name}.bias": (config.d_model,)})
    size = (config.max_source_positions, config.d_model)
    yield Slot(encoder.positions, {"model.encoder.embed_positions.weight": size})
    for i, block in enumerate(encoder.blocks):
        yield from _block(block, config.d_model, config.encoder_ffn_dim, f"model.encoder.layers.{i}.")
    yield from _norm(encoder.norm, "model.encoder.layer_norm")


def _block(block: EncoderBlock | DecoderBlock, size: int, inner: int, layer: str) -> Iterator[Slot]:
    """The parameters that layers of the encoder and the decoder share."""
    yield from _norm(block.attention_norm, layer + "self_attn_layer_norm")
    yield from _affine(block.attention.query_value_key, size, layer + "self_attn.", "q_proj", "v_proj", "k_proj")
    yield from _affine(block.attention.out, size, layer + "self_attn.", "out_proj")
    yield from _norm(block.mlp_norm, layer + "final_layer_norm")
    yield from _affine(block.mlp.up, size, layer, "fc1", num_out=inner)
    yield from _affine(block.mlp.down, inner, layer, "fc2", num_out=size)


def _affine(
    affine: nnx.Linear | PartlyBiasedLinear, size: int, prefix: str, *names: str, num_out: int | None = None
) -> Iterator[Slot]:
    """A matrix and its bias; several names are matrices stored as one, of which the key's has no bias."""
    out = size if num_out is None else num_out
    yield Slot(affine.kernel, {f"{prefix}{name}.weight": (out, size) for name in names}, transposed=True)
    assert affine.bias is not None
    yield Slot(affine.bias, {f"{prefix}{name}.bias": (out,) for name in names if name != "k_proj"})


def _norm(norm: LayerNorm, name: str) -> Iterator[Slot]:
    for part in ("weight", "bias"):
        param = getattr(norm, part)
        yield Slot(param, {f"{name}.{part}": param.shape})
