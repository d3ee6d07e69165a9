"""Whisper: an encoder of speech and a decoder of its text (Radford et al., 2022, arXiv 2212.04356).

Pre-norm blocks with LayerNorm and biases; the encoder has sinusoidal positions, the decoder learned ones, and the
decoder's head is its embedding. `decoder_model` reads the encoder's output once per utterance and returns a `Model`
whose parameters hold each layer's keys and values of it, so that a decoding loop runs the decoder alone.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from specsamp_jax._types import Model
from specsamp_jax.models.cache import Cache, CacheSpec, LayerCache, causal_mask
from specsamp_jax.models.layers import Vocabulary, normal_param
from specsamp_jax.models.whisper.config import WhisperConfig as WhisperConfig
from specsamp_jax.models.whisper.layers import INIT_STDDEV, MLP, CrossAttention, KeysValues, LayerNorm, SelfAttention


class EncoderBlock(nnx.Module):
    """One layer of the encoder."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, **kwargs):
        self.attention_norm = LayerNorm(config.d_model, **kwargs)
        self.attention = SelfAttention(config.d_model, config.encoder_attention_heads, rngs=rngs, **kwargs)
        self.mlp_norm = LayerNorm(config.d_model, **kwargs)
        self.mlp = MLP(config.d_model, config.encoder_ffn_dim, rngs=rngs, **kwargs)

    def __call__(self, x: Float[Array, "B S F"]) -> Float[Array, "B S F"]:
        """Returns the residual stream after this layer."""
        x = x + self.attention(self.attention_norm(x))[0]
        return x + self.mlp(self.mlp_norm(x))


class DecoderBlock(nnx.Module):
    """One layer of the decoder."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, **kwargs):
        self.attention_norm = LayerNorm(config.d_model, **kwargs)
        self.attention = SelfAttention(config.d_model, config.decoder_attention_heads, rngs=rngs, **kwargs)
        self.cross_norm = LayerNorm(config.d_model, **kwargs)
        self.cross = CrossAttention(config.d_model, config.decoder_attention_heads, rngs=rngs, **kwargs)
        self.mlp_norm = LayerNorm(config.d_model, **kwargs)
        self.mlp = MLP(config.d_model, config.decoder_ffn_dim, rngs=rngs, **kwargs)

    def __call__(
        self, x: Float[Array, "B T F"], positions: Int[Array, "B T"], mask: Any, cross: KeysValues, cache: LayerCache
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the residual stream after this layer, and the layer's cache."""
        attended, written = self.attention(self.attention_norm(x), positions, mask, cache)
        return self.finish(x + attended, cross), written

    def finish(self, x: Float[Array, "B T F"], cross: KeysValues) -> Float[Array, "B T F"]:
        """Returns the residual stream after this layer from the one after its self-attention."""
        x = x + self.cross(self.cross_norm(x), cross)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """Encoder of log-mel features; one state for every two frames."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, **kwargs):
        init = nnx.initializers.normal(INIT_STDDEV)
        conv: dict[str, Any] = {"kernel_size": 3, "padding": 1, "kernel_init": init, "rngs": rngs, **kwargs}
        self.conv1 = nnx.Conv(config.num_mel_bins, config.d_model, strides=1, **conv)
        self.conv2 = nnx.Conv(config.d_model, config.d_model, strides=2, **conv)
        self.positions = nnx.Param(sinusoids(config.max_source_positions, config.d_model, kwargs["param_dtype"]))
        self.blocks = nnx.List([EncoderBlock(config, rngs=rngs, **kwargs) for _ in range(config.encoder_layers)])
        self.norm = LayerNorm(config.d_model, **kwargs)

    def __call__(self, features: Float[Array, "B M F"]) -> Float[Array, "B S D"]:
        """Returns the states of whole windows; F is twice `max_source_positions`."""
        x = jax.nn.gelu(self.conv1(jnp.swapaxes(features, 1, 2)), approximate=False)
        x = jax.nn.gelu(self.conv2(x), approximate=False)
        x = x + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nnx.Module):
    """Decoder that maps text and the encoder's states to logits."""

    def __init__(self, config: WhisperConfig, *, rngs: nnx.Rngs, **kwargs):
        self.dtype = kwargs["dtype"]
        self.vocabulary = Vocabulary(
            config.vocab_size, config.d_model, tied=True, stddev=INIT_STDDEV, rngs=rngs, **kwargs
        )
        size = config.max_target_positions, config.d_model
        self.positions = normal_param(rngs.params(), size, INIT_STDDEV, kwargs["param_dtype"])
        self.blocks = nnx.List([DecoderBlock(config, rngs=rngs, **kwargs) for _ in range(config.decoder_layers)])
        self.norm = LayerNorm(config.d_model, **kwargs)

    def read(self, states: Float[Array, "B S F"]) -> tuple[KeysValues, ...]:
        """Returns each layer's keys and values of the encoder's states."""
        return tuple(block.cross.read(states) for block in self.blocks)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cross: tuple[KeysValues, ...], cache: Cache
    ) -> tuple[Float[Array, "B T V"], Cache]:
        """Returns the logits after each token, float32, and the cache with these tokens written.

        Args:
          tokens: Token ids; an id outside the vocabulary, such as padding, is read as the nearest one inside.
          positions: Position of each token in its sequence, per row. Positions from `max_target_positions` on
            get the last embedding; a text must end before them.
          cross: Keys and values from `read`.
          cache: Cache from the model's `init_cache_fn` or an earlier call; as in `Llama`.
        """
        x = self._embed(tokens, positions)
        mask = causal_mask(positions, cache[0].keys.shape[1])[:, None]
        written = []
        for block, layer_cross, layer_cache in zip(self.blocks, cross, cache, strict=True):
            x, layer_cache = block(x, positions, mask, layer_cross, layer_cache)
            written.append(layer_cache)
        return self.vocabulary.logits(self.norm(x)), tuple(written)

    def cross_weights(
        self, tokens: Int[Array, "B T"], cross: tuple[KeysValues, ...], heads: Sequence[tuple[int, int]]
    ) -> Float[Array, "B H T S"]:
        """Returns the weights of `cross_attention`; `tokens` have the positions from 0 on."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, mask = self._embed(tokens, positions), causal_mask(positions, tokens.shape[1])[:, None]
        weights: dict[tuple[int, int], Array] = {}
        last = max(layer for layer, _ in heads)
        for i, (block, layer_cross) in enumerate(zip(self.blocks, cross, strict=True)):
            x = x + block.attention(block.attention_norm(x), mask=mask)[0]
            if any(layer == i for layer, _ in heads):
                layer_weights = block.cross.weights(block.cross_norm(x), layer_cross)
                weights |= {(i, head): layer_weights[:, head] for layer, head in heads if layer == i}
            if i == last:  # later layers change no weights
                break
            x = block.finish(x, layer_cross)
        return jnp.stack([weights[head] for head in heads], axis=1)

    def _embed(self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        embedded = self.positions[...].at[positions].get(mode="clip", wrap_negative_indices=False)
        return self.vocabulary.embed(tokens) + embedded.astype(self.dtype)


class Whisper(nnx.Module):
    """An encoder and a decoder; `encode` and `decoder_model` run them.

    Attributes:
      config: The sizes.
      dtype: Dtype of the computation and of caches. Norms and softmax are computed in float32, and the logits are
        float32.
      encoder: The encoder. Two modules with equal encoders may share one, to save memory.
      decoder: The decoder.

    Example:
      >>> sizes = {"num_mel_bins": 4, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1}
      >>> config = WhisperConfig(vocab_size=32, max_source_positions=10, **sizes)
      >>> module = Whisper(config, rngs=nnx.Rngs(0))
      >>> states = encode(module, jnp.zeros((1, 4, 20)))
      >>> model = decoder_model(module, states)
      >>> tokens, positions = jnp.array([[5, 7]]), jnp.array([[0, 1]])
      >>> logits, cache = jax.jit(model.apply_fn)(model.params, tokens, positions, model.init_cache_fn(1, 8))
      >>> states.shape, logits.shape
      ((1, 10, 24), (1, 2, 32))
    """

    def __init__(
        self,
        config: WhisperConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        kwargs = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype), "rngs": rngs}
        self.encoder = Encoder(config, **kwargs)
        self.decoder = Decoder(config, **kwargs)


def sinusoids(num_positions: int, num_features: int, dtype: DTypeLike) -> Float[Array, "S F"]:
    """Returns the encoder's position embeddings: sines, then cosines, of wavelengths from 2 pi to 20000 pi.

    Angle i of `F / 2` grows by `10000^(-i / (F / 2 - 1))` per position (Vaswani et al., 2017, arXiv 1706.03762,
    section 3.5, arranged as in Whisper). Checkpoints hold them.
    """
    half = num_features // 2
    angles = np.arange(num_positions)[:, None] * 10000 ** (-np.arange(half) / max(half - 1, 1))
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), dtype)


def encode(module: Whisper, features: Float[Array | np.ndarray, "B M F"]) -> Float[Array, "B S D"]:
    """Returns the encoder's states of each window of features, computed window by window.

    Args:
      module: The model.
      features: Log-mel features of whole windows, `num_mel_bins` times `config.num_frames` each.

    Raises:
      ValueError: Features of another shape.
    """
    expected = (module.config.num_mel_bins, module.config.num_frames)
    if features.ndim != 3 or features.shape[1:] != expected:
        raise ValueError(
            f"features must have shape [B, M, F] = [B, {expected[0]}, {expected[1]}] by the config, "
            f"got {list(features.shape)}."
        )
    graphdef, params = nnx.split(module.encoder)
    # One by one, because a window fills a device and its attention scores are large (20 x 1500 x 1500 float32).
    return jnp.concatenate([_encode(graphdef, params, features[i : i + 1]) for i in range(len(features))])


def decoder_model(module: Whisper, states: Float[Array, "B S F"]) -> Model:
    """Returns the decoder as a `Model` of the text of B utterances, row by row.

    The parameters are the decoder's and each layer's keys and values of the states; the cache holds the text only.
    Other utterances of the same shape need no new trace.

    Args:
      module: The model.
      states: States from `encode`, of this model or of one with an equal encoder.
    """
    graphdef, params = nnx.split(module.decoder)
    config = module.config
    heads = config.decoder_attention_heads
    spec = CacheSpec(config.decoder_layers, heads, config.d_model // heads, module.dtype)
    params = {"decoder": nnx.to_pure_dict(params), "cross": _read(graphdef, params, states)}
    return Model(params, _DecoderCall(graphdef), spec)


def cross_attention(
    model: Model, tokens: Int[Array | np.ndarray, "B T"], *, heads: tuple[tuple[int, int], ...]
) -> Float[Array, "B H T S"]:
    """Returns the weights of each window's states for each token of a text, float32; they sum to 1 over S.

    The decoder reads whole texts at once, without a cache.

    Args:
      model: A model from `decoder_model`.
      tokens: Texts with their prompts; an id outside the vocabulary, such as padding, is read as in `Decoder`.
      heads: Layer and head of each of the H weights, from 0 on; at least one.
    """
    if not isinstance(model.apply_fn, _DecoderCall):
        raise ValueError(f"model must come from decoder_model, got apply_fn = {model.apply_fn!r}.")
    return _cross_weights(model.apply_fn.graphdef, model.params, tokens, heads)


@dataclasses.dataclass(frozen=True)
class _DecoderCall:
    """`(params, tokens, positions, cache) -> (logits, cache)`; equal for decoders of equal structure."""

    graphdef: Any

    def __call__(self, params, tokens, positions, cache):
        return nnx.merge(self.graphdef, params["decoder"])(tokens, positions, params["cross"], cache)


@functools.partial(jax.jit, static_argnums=0)
def _encode(graphdef, params, features):
    return nnx.merge(graphdef, params)(features)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _cross_weights(graphdef, params, tokens, heads):
    return nnx.merge(graphdef, params["decoder"]).cross_weights(tokens, params["cross"], heads)


@functools.partial(jax.jit, static_argnums=0)
def _read(graphdef, params, states):
    return nnx.merge(graphdef, params).read(states)
