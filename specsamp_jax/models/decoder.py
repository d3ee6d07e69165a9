"""The decoder-only transformer that the families share: pre-norm blocks over a residual stream.

RMSNorm, rotary positions, grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245) and a gated MLP
(Shazeer, 2020, arXiv 2002.05202). Matrices that read the same input are one matrix: query, key and value, and
gate and up. Checkpoints keep them apart.
"""

from collections.abc import Callable, Iterator
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
from specsamp_jax.models.layers import Linear, RMSNorm, Vocabulary
from specsamp_jax.models.rotary import rotary_angles, rotate

INIT_STDDEV = 0.02  # of GPT-2 and Llama; the matrices that add to the residual stream are scaled down by depth

Angles = tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]


class Attention(nnx.Module):
    """Causal self-attention: `num_attention_heads` queries share `num_key_value_heads` keys and values.

    Attributes:
      query_norm: Norm over each head's query before it is rotated, or None.
      key_norm: The same for keys.
      scale: Multiplies the scores. None: `1 / sqrt(head_dim)`.
      softcap: Bound of the scores, see `attend`; None: none.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        bias: bool = False,
        head_norms: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.scale, self.softcap = config.head_size, scale, softcap
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        kwargs: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.qkv = Linear(config.hidden_size, width + 2 * kv_width, bias=bias, stddev=INIT_STDDEV, rngs=rngs, **kwargs)
        self.out = Linear(width, config.hidden_size, stddev=_residual_stddev(config), rngs=rngs, **kwargs)
        norm = {"eps": config.rms_norm_eps, **kwargs}
        self.query_norm = RMSNorm(self.head_dim, **norm) if head_norms else None
        self.key_norm = RMSNorm(self.head_dim, **norm) if head_norms else None

    def __call__(
        self,
        x: Float[Array, "B T F"],
        positions: Int[Array, "B T"],
        angles: Angles,
        mask: Bool[Array, "#B 1 T S"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns what is added to `x`, and the cache with the keys and values of `x` written."""
        heads = self.qkv(x).reshape(*x.shape[:2], -1, self.head_dim)
        query, key, value = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is not None:
            key, value = write_positions(cache.keys, key, positions), write_positions(cache.values, value, positions)
            cache = LayerCache(key, value)
        attended = attend(query, key, value, mask, scale=self.scale, softcap=self.softcap)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: DecoderConfig, *, activation_fn: Callable[[Array], Array], **kwargs):
        self.activation_fn = activation_fn
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, stddev=INIT_STDDEV, **kwargs)
        self.down = Linear(config.intermediate_size, config.hidden_size, stddev=_residual_stddev(config), **kwargs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns what is added to `x`."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(self.activation_fn(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then the MLP, each of the normed residual stream and added to it."""

    attention_norm: RMSNorm
    mlp_norm: RMSNorm
    norm_tensors: ClassVar[dict[str, str]] = {
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
    }
    """The norms, and what checkpoints call them."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        activation_fn: Callable[[Array], Array] = jax.nn.silu,
        norm_offset: float = 0.0,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
        **attention: Any,
    ):
        kwargs = {"dtype": dtype, "param_dtype": param_dtype}
        norm = {"eps": config.rms_norm_eps, "offset": norm_offset, **kwargs}
        for name in self.norm_tensors:
            setattr(self, name, RMSNorm(config.hidden_size, **norm))
        self.attention = Attention(config, rngs=rngs, **kwargs, **attention)
        self.mlp = MLP(config, activation_fn=activation_fn, rngs=rngs, **kwargs)

    def __call__(
        self, x: Float[Array, "B T F"], positions: Int[Array, "B T"], angles: Angles, mask: Any, cache: Any
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the residual stream behind this layer, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x), positions, angles, mask, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """A decoder-only transformer; each family says what is its own.

    Attributes:
      config: The sizes.
      dtype: What it computes in, and what the cache is kept in. Norms, rotations and the softmax are computed
        in float32, and the logits are float32.
    """

    norm_offset: ClassVar[float] = 0.0

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
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
        self.blocks = nnx.List([self.make_block(rngs=rngs, **kwargs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, offset=self.norm_offset, **kwargs)

    def make_block(self, **kwargs: Any) -> Block:
        """Returns one layer of this family; `kwargs` are the dtypes and the random streams."""
        return Block(self.config, **kwargs)

    def scale_embeddings(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns the residual stream before the first layer, of the embeddings in `dtype`."""
        return x

    def cap_logits(self, logits: Float[Array, "B T V"]) -> Float[Array, "B T V"]:
        """Returns the logits, of those that the head gives."""
        return logits

    @property
    def init_cache_fn(self) -> CacheSpec:
        """`(batch_size, max_length) -> cache`."""
        config = self.config
        return CacheSpec(config.num_hidden_layers, config.num_key_value_heads, config.head_size, self.dtype)

    def __call__(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache | None = None
    ) -> tuple[Float[Array, "B T V"], Cache | None]:
        """Returns the logits behind each token, float32, and the cache with these tokens written.

        Args:
          tokens: Token ids; one outside the vocabulary, such as padding, is read as the nearest within.
          positions: Where each token stands in its sequence, per row. Without a cache they only turn the
            rotary angles: token t attends tokens 0 to t of `tokens`.
          cache: What `init_cache_fn` or an earlier call returned. The token at position s attends slots 0 to s,
            or the last of them in a layer with a window, with this call's tokens in theirs. A position that is
            written again replaces what was there; one that the cache has no room for is dropped. A position may
            occur twice with the same token.
        """
        x = self.scale_embeddings(self.vocabulary.embed(tokens))
        config = self.config
        angles = rotary_angles(positions, config.head_size, config.rope_theta, config.rope_scaling)
        if cache is None:
            order, num_slots = jnp.arange(tokens.shape[1])[None], tokens.shape[1]
        else:
            order, num_slots = positions, cache[0].keys.shape[1]
        masks = {window: causal_mask(order, num_slots, window)[:, None] for window in set(config.windows)}
        written = []
        caches = (None,) * len(self.blocks) if cache is None else cache
        for block, window, layer_cache in zip(self.blocks, config.windows, caches, strict=True):
            x, layer_cache = block(x, positions, angles, masks[window], layer_cache)
            written.append(layer_cache)
        logits = self.cap_logits(self.vocabulary.logits(self.norm(x)))
        return logits, None if cache is None else tuple(written)


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
        for name, tensor in block.norm_tensors.items():
            yield Slot(getattr(block, name).weight, {f"{layer}{tensor}.weight": (hidden,)})
        qkv = {f"{attention}{name}_proj.weight": (width, hidden) for name, width in widths.items()}
        yield Slot(block.attention.qkv.weight, qkv, transposed=True)
        if block.attention.qkv.bias is not None:
            biases = {f"{attention}{name}_proj.bias": (width,) for name, width in widths.items()}
            yield Slot(block.attention.qkv.bias, biases)
        for name, norm in (("q_norm", block.attention.query_norm), ("k_norm", block.attention.key_norm)):
            if norm is not None:
                yield Slot(norm.weight, {f"{attention}{name}.weight": (config.head_size,)})
        yield Slot(block.attention.out.weight, {attention + "o_proj.weight": (hidden, query)}, transposed=True)
        gate_up = {f"{mlp}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        yield Slot(block.mlp.gate_up.weight, gate_up, transposed=True)
        yield Slot(block.mlp.down.weight, {mlp + "down_proj.weight": (hidden, inner)}, transposed=True)
    yield Slot(module.norm.weight, {"model.norm.weight": (hidden,)})
