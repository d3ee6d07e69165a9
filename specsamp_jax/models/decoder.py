"""Decoder-only transformer of all families: pre-norm blocks over a residual stream.

RMSNorm, rotary positions, grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245) and a gated MLP
(Shazeer, 2020, arXiv 2002.05202). Matrices that read the same input are one matrix: query, key and value, and
gate and up. Checkpoints keep them apart. `families` lists the differences between families.
"""

import functools
from collections.abc import Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.models.attention import attend
from specsamp_jax.models.cache import Cache, CacheSpec, LayerCache, causal_mask, write_positions
from specsamp_jax.models.checkpoints.slots import Slot, vocabulary_layout
from specsamp_jax.models.config import DecoderConfig
from specsamp_jax.models.layers import RMSNorm, Vocabulary, linear
from specsamp_jax.models.rotary import rotary_angles, rotate

INIT_STDDEV = 0.02  # of GPT-2 and Llama; the matrices that add to the residual stream are scaled down by depth

Angles = tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]


class Attention(nnx.Module):
    """Causal self-attention: `num_attention_heads` queries share `num_key_value_heads` keys and values.

    Attributes:
      query_norm: Norm of each head's query before it is rotated, or None.
      key_norm: Norm of each head's key before it is rotated, or None.
    """

    def __init__(self, config: DecoderConfig, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_size
        qkv_width = width + 2 * config.num_key_value_heads * config.head_size
        bias = config.family.qkv_bias
        self.qkv = linear(hidden, qkv_width, bias=bias, stddev=INIT_STDDEV, rngs=rngs, **kwargs)
        self.out = linear(width, hidden, stddev=_residual_stddev(config), rngs=rngs, **kwargs)
        has_norms = config.family.head_norms
        self.query_norm = _norm(config, config.head_size, **kwargs) if has_norms else None
        self.key_norm = _norm(config, config.head_size, **kwargs) if has_norms else None

    def __call__(
        self,
        x: Float[Array, "B T F"],
        positions: Int[Array, "B T"],
        angles: Angles,
        mask: Bool[Array, "#B 1 T S"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the output, to be added to the residual stream, and the cache with the new keys and values."""
        config, num_heads = self.config, self.config.num_attention_heads
        heads = self.qkv(x).reshape(*x.shape[:2], -1, config.head_size)
        rotated, value = jnp.split(heads, [num_heads + config.num_key_value_heads], axis=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = jnp.split(rotated, [num_heads], axis=2)
            rotated = jnp.concatenate([self.query_norm(query), self.key_norm(key)], axis=2)
        # Queries and keys at once: a compiled program is 7 % smaller than with two rotations.
        query, key = jnp.split(rotate(rotated, *angles), [num_heads], axis=2)
        if cache is not None:
            key, value = write_positions(cache.keys, key, positions), write_positions(cache.values, value, positions)
            cache = LayerCache(key, value)
        scalar = config.query_pre_attn_scalar
        scale = None if scalar is None else scalar**-0.5
        attended = attend(query, key, value, mask, scale=scale, softcap=config.attn_logit_softcapping)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """`down(activation_fn(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, **kwargs: Any):
        self.activation_fn = config.family.activation_fn
        self.gate_up = linear(config.hidden_size, 2 * config.intermediate_size, stddev=INIT_STDDEV, **kwargs)
        self.down = linear(config.intermediate_size, config.hidden_size, stddev=_residual_stddev(config), **kwargs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns the output, to be added to the residual stream."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(self.activation_fn(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then the MLP. Each reads the normed residual stream and adds its output to it.

    Attributes:
      post_attention_norm: Norm of attention's output before it is added, or None.
      post_mlp_norm: Norm of the MLP's output before it is added, or None.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, **kwargs: Any):
        size = config.hidden_size
        self.attention_norm, self.mlp_norm = _norm(config, size, **kwargs), _norm(config, size, **kwargs)
        self.post_attention_norm = _norm(config, size, **kwargs) if config.family.post_norms else None
        self.post_mlp_norm = _norm(config, size, **kwargs) if config.family.post_norms else None
        self.attention = Attention(config, rngs=rngs, **kwargs)
        self.mlp = MLP(config, rngs=rngs, **kwargs)

    def __call__(
        self, x: Float[Array, "B T F"], positions: Int[Array, "B T"], angles: Angles, mask: Any, cache: Any
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the residual stream after this layer, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x), positions, angles, mask, cache)
        x = x + (attended if self.post_attention_norm is None else self.post_attention_norm(attended))
        transformed = self.mlp(self.mlp_norm(x))
        return x + (transformed if self.post_mlp_norm is None else self.post_mlp_norm(transformed)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer; each family has a subclass with its `model_type`.

    Attributes:
      config: The sizes.
      dtype: Dtype of the computation and of the cache. Norms, rotations and the softmax are computed in float32,
        and the logits are float32.

    Raises:
      ValueError: The config is that of another family.
    """

    model_type: ClassVar[str]

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if config.model_type != self.model_type:
            raise ValueError(
                f"config must be one of {self.model_type!r} for {type(self).__name__}, got {config.model_type!r}."
            )
        self.config, self.dtype = config, jnp.dtype(dtype)
        kwargs = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype)}
        self.vocabulary = Vocabulary(
            config.vocab_size,
            config.hidden_size,
            tied=config.tie_word_embeddings,
            stddev=INIT_STDDEV,
            rngs=rngs,
            **kwargs,
        )
        self.blocks = nnx.List([Block(config, rngs=rngs, **kwargs) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config, config.hidden_size, **kwargs)

    @property
    def init_cache_fn(self) -> CacheSpec:
        """`(batch_size, max_length) -> cache`."""
        config = self.config
        return CacheSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_size, self.dtype)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Returns the logits after each token, float32, and the cache with these tokens written.

        Args:
          tokens: Token ids; an id outside the vocabulary, such as padding, is read as the nearest one inside.
          positions: Position of each token in its sequence, per row. Without a cache they only turn the rotary
            angles: token t attends tokens 0 to t of `tokens`.
          cache: Cache from `init_cache_fn` or an earlier call. The token at position s attends slots 0 to s, or
            the last of them in a layer with a window, after this call's tokens are written. Writing a position
            again replaces its keys and values; a position outside the cache is dropped. A position may occur
            twice with the same token.
        """
        config, x = self.config, self.vocabulary.embed(tokens)
        if config.family.scaled_embeddings:
            # The factor is rounded to the dtype, as it was in training.
            x = x * jnp.asarray(config.hidden_size**0.5, x.dtype)
        angles = {rope: rotary_angles(positions, config.head_size, *rope) for rope in dict.fromkeys(config.ropes)}
        if cache is None:
            order, num_slots = jnp.arange(tokens.shape[1])[None], tokens.shape[1]
        else:
            order, num_slots = positions, cache[0].keys.shape[1]
        masks = {window: causal_mask(order, num_slots, window)[:, None] for window in set(config.windows)}
        # All layers use these few numbers. Without the barrier XLA computes them again in each layer.
        angles = dict(zip(angles, jax.lax.optimization_barrier(list(angles.values())), strict=True))
        masks = dict(zip(masks, jax.lax.optimization_barrier(list(masks.values())), strict=True))
        written = []
        caches = (None,) * len(self.blocks) if cache is None else cache
        for block, rope, window, layer_cache in zip(self.blocks, config.ropes, config.windows, caches, strict=True):
            x, layer_cache = _run_block(*nnx.split(block), x, positions, angles[rope], masks[window], layer_cache)
            written.append(layer_cache)
        logits, cap = self.vocabulary.logits(self.norm(x)), config.final_logit_softcapping
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return logits, None if cache is None else tuple(written)


@functools.partial(jax.jit, static_argnums=0)
def _run_block(graphdef: Any, weights: Any, *arguments: Any) -> tuple[Array, LayerCache | None]:
    """Runs a block, which is traced and lowered once for all layers of equal shapes."""
    return nnx.merge(graphdef, weights)(*arguments)


def _norm(config: DecoderConfig, num_features: int, **kwargs: Any) -> RMSNorm:
    return RMSNorm(num_features, eps=config.rms_norm_eps, offset=config.family.norm_offset, **kwargs)


def _residual_stddev(config: DecoderConfig) -> float:
    return INIT_STDDEV / (2 * config.num_hidden_layers) ** 0.5


def checkpoint_layout(module: Decoder) -> Iterator[Slot]:
    """Yields every parameter of `module` with its tensors in Hugging Face's `...ForCausalLM`."""
    config = module.config
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    widths = {"q": query, "k": kv, "v": kv}
    yield from vocabulary_layout(module.vocabulary, "model.embed_tokens.weight", "lm_head.weight")
    for i, block in enumerate(module.blocks):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        for norm, name in _block_norms(block):
            yield Slot(norm.weight, {f"{layer}{name}.weight": (hidden,)})
        qkv = {f"{attention}{name}_proj.weight": (width, hidden) for name, width in widths.items()}
        yield Slot(block.attention.qkv.kernel, qkv, transposed=True)
        if block.attention.qkv.bias is not None:
            biases = {f"{attention}{name}_proj.bias": (width,) for name, width in widths.items()}
            yield Slot(block.attention.qkv.bias, biases)
        for name, norm in (("q_norm", block.attention.query_norm), ("k_norm", block.attention.key_norm)):
            if norm is not None:
                yield Slot(norm.weight, {f"{attention}{name}.weight": (config.head_size,)})
        yield Slot(block.attention.out.kernel, {attention + "o_proj.weight": (hidden, query)}, transposed=True)
        gate_up = {f"{mlp}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        yield Slot(block.mlp.gate_up.kernel, gate_up, transposed=True)
        yield Slot(block.mlp.down.kernel, {mlp + "down_proj.weight": (hidden, inner)}, transposed=True)
    yield Slot(module.norm.weight, {"model.norm.weight": (hidden,)})


def _block_norms(block: Block) -> Iterator[tuple[RMSNorm, str]]:
    """Yields the norms over the residual stream, with their names in checkpoints."""
    yield block.attention_norm, "input_layernorm"
    if block.post_attention_norm is None or block.post_mlp_norm is None:
        # With two norms, the one before the MLP has the name of its place: after attention.
        yield block.mlp_norm, "post_attention_layernorm"
    else:
        yield block.post_attention_norm, "post_attention_layernorm"
        yield block.mlp_norm, "pre_feedforward_layernorm"
        yield block.post_mlp_norm, "post_feedforward_layernorm"
