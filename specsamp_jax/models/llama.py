"""The Llama family: decoder-only transformers (Touvron et al., 2023, arXiv 2302.13971).

Pre-norm blocks with RMSNorm, rotary positions, grouped-query attention (Ainslie et al., 2023, arXiv 2305.13245)
and a gated SiLU MLP (Shazeer, 2020, arXiv 2002.05202). Matrices that read the same input are one matrix: query,
key and value, and gate and up. Checkpoints keep them apart.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.models._layers import Linear, RMSNorm, normal_param, rotary_angles, rotate
from specsamp_jax.models.cache import Cache, CacheSpec, LayerCache, causal_mask, write_positions

_INIT_STDDEV = 0.02  # of GPT-2 and Llama; the matrices that add to the residual stream are scaled down by depth

# What config.json may say only this way, because nothing else is implemented.
_REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a Llama, under the names of Hugging Face's config.json.

    Attributes:
      vocab_size: Tokens.
      hidden_size: Features of the residual stream.
      intermediate_size: Features between the matrices of the MLP.
      num_hidden_layers: Blocks.
      num_attention_heads: Heads of queries.
      num_key_value_heads: Heads of keys and values; divides `num_attention_heads`.
      head_dim: Features of a head, even. None: `hidden_size / num_attention_heads`.
      rope_theta: Base of the rotary frequencies.
      rms_norm_eps: Added to the mean square in each norm.
      tie_word_embeddings: Whether the head is the embedding, transposed. A head of its own costs memory, and
        is quicker on a CPU.
      max_position_embeddings: The longest text trained on; recorded, not enforced.

    Raises:
      ValueError: Sizes that do not fit together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{field.name} must be above 0, got {value}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head_dim must be given where num_attention_heads = {self.num_attention_heads} does not divide "
                f"hidden_size = {self.hidden_size}."
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim must be even, for rotary positions turn pairs, got {self.head_size}.")

    @property
    def head_size(self) -> int:
        """`head_dim`, or what stands for it."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    def to_dict(self) -> dict[str, Any]:
        """Returns what Hugging Face's config.json holds for this model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **dataclasses.asdict(self),
            "head_dim": self.head_size,
            **_REQUIRED,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LlamaConfig":
        """Returns the config that a config.json describes.

        Args:
          values: The parsed file. `rope_theta` may stand within `rope_parameters`, as transformers 5 writes it.

        Raises:
          ValueError: Another model type, or a setting that is not implemented, such as rope scaling.
        """
        model_type = values.get("model_type")
        if model_type != "llama":
            raise ValueError(f"model_type must be 'llama', got {model_type!r}; other families cannot be loaded yet.")
        rope = values.get("rope_parameters") or {}
        flat = {**values, **{key: rope[key] for key in ("rope_theta",) if key in rope}}
        if rope.get("rope_type", "default") != "default":
            flat["rope_scaling"] = rope
        for key, required in _REQUIRED.items():
            if flat.get(key, required) != required:
                raise ValueError(f"{key} must be {required!r}, got {flat[key]!r}; this is not supported yet.")
        names = [field.name for field in dataclasses.fields(cls)]
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in flat]
        if missing == ["num_key_value_heads"]:  # config.json of the first Llama: as many as query heads
            flat["num_key_value_heads"] = flat["num_attention_heads"]
        elif missing:
            raise ValueError(f"The config must hold {', '.join(missing)}, which it does not.")
        return cls(**{name: flat[name] for name in names if name in flat})


class Attention(nnx.Module):
    """Causal self-attention: `num_attention_heads` queries share `num_key_value_heads` keys and values."""

    def __init__(self, config: LlamaConfig, **kwargs):
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_size
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        stddev = _INIT_STDDEV / (2 * config.num_hidden_layers) ** 0.5
        self.qkv = Linear(config.hidden_size, width + 2 * kv_width, stddev=_INIT_STDDEV, **kwargs)
        self.out = Linear(width, config.hidden_size, stddev=stddev, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B T F"],
        positions: Int[Array, "B T"],
        angles: tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]],
        mask: Bool[Array, "B 1 T S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns what is added to `x`, and the cache with the keys and values of `x` written."""
        heads = self.qkv(x).reshape(*x.shape[:2], -1, self.head_dim)
        query, key, value = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=2)
        query, key = rotate(query, *angles), rotate(key, *angles)
        if cache is None:
            attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        else:
            keys, values = write_positions(cache.keys, key, positions), write_positions(cache.values, value, positions)
            cache = LayerCache(keys, values)
            attended = jax.nn.dot_product_attention(query, *cache, mask=mask)
        return self.out(attended.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, **kwargs):
        stddev = _INIT_STDDEV / (2 * config.num_hidden_layers) ** 0.5
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, stddev=_INIT_STDDEV, **kwargs)
        self.down = Linear(config.intermediate_size, config.hidden_size, stddev=stddev, **kwargs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns what is added to `x`."""
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(jax.nn.silu(gate) * up)


class Block(nnx.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig, *, dtype, param_dtype, rngs):
        norm = {"eps": config.rms_norm_eps, "dtype": dtype, "param_dtype": param_dtype}
        self.attention_norm = RMSNorm(config.hidden_size, **norm)
        self.attention = Attention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = MLP(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T F"], positions: Int[Array, "B T"], angles: Any, mask: Any, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the residual stream behind this layer, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x), positions, angles, mask, cache)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """A decoder-only transformer of the Llama shape.

    Attributes:
      config: The sizes.
      dtype: What it computes in, and what the cache is kept in. Norms, rotations and the softmax are computed
        in float32, and the logits are float32.

    Example:
      >>> config = LlamaConfig(32, 16, 48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
      >>> module = Llama(config, rngs=nnx.Rngs(0))
      >>> tokens, positions = jnp.array([[5, 7]]), jnp.array([[0, 1]])
      >>> logits, cache = module(tokens, positions, module.init_cache_fn(batch_size=1, max_length=8))
      >>> logits.shape
      (1, 2, 32)
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype = config, jnp.dtype(dtype)
        kwargs = {"dtype": self.dtype, "param_dtype": jnp.dtype(param_dtype)}
        size = config.vocab_size, config.hidden_size
        self.embedding = normal_param(rngs.params(), size, _INIT_STDDEV, param_dtype)
        self.blocks = nnx.List([Block(config, rngs=rngs, **kwargs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        tied = config.tie_word_embeddings
        self.head = None if tied else normal_param(rngs.params(), size[::-1], _INIT_STDDEV, param_dtype)

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
            with this call's tokens in theirs. A position that is written again replaces what was there; one
            that the cache has no room for is dropped. A position may occur twice with the same token.
        """
        x = self.embedding[...].at[tokens].get(mode="clip", wrap_negative_indices=False).astype(self.dtype)
        angles = rotary_angles(positions, self.config.head_size, self.config.rope_theta)
        caches = (None,) * len(self.blocks) if cache is None else cache
        mask = None if cache is None else causal_mask(positions, cache[0].keys.shape[1])[:, None]
        written = []
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            x, layer_cache = block(x, positions, angles, mask, layer_cache)
            written.append(layer_cache)
        x = self.norm(x)
        weight, product = (self.embedding, "btd,vd->btv") if self.head is None else (self.head, "btd,dv->btv")
        logits = jnp.einsum(product, x, weight[...].astype(self.dtype), preferred_element_type=jnp.float32)
        return logits, None if cache is None else tuple(written)


class Slot(NamedTuple):
    """Where one parameter stands in a checkpoint.

    Attributes:
      param: The parameter.
      tensors: Names and shapes of the tensors that make it up, in order of their first axis.
      transposed: Whether the parameter is the transpose of the tensors.
    """

    param: nnx.Param
    tensors: dict[str, tuple[int, ...]]
    transposed: bool = False


def checkpoint_layout(module: Llama) -> Iterator[Slot]:
    """Yields every parameter of `module` with its tensors in Hugging Face's `LlamaForCausalLM`."""
    config = module.config
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    yield Slot(module.embedding, {"model.embed_tokens.weight": (config.vocab_size, hidden)})
    for i, block in enumerate(module.blocks):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        yield Slot(block.attention_norm.weight, {layer + "input_layernorm.weight": (hidden,)})
        qkv = {
            f"{attention}{name}_proj.weight": (width, hidden)
            for name, width in zip("qkv", (query, kv, kv), strict=True)
        }
        yield Slot(block.attention.qkv.weight, qkv, transposed=True)
        yield Slot(block.attention.out.weight, {attention + "o_proj.weight": (hidden, query)}, transposed=True)
        yield Slot(block.mlp_norm.weight, {layer + "post_attention_layernorm.weight": (hidden,)})
        gate_up = {f"{mlp}{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        yield Slot(block.mlp.gate_up.weight, gate_up, transposed=True)
        yield Slot(block.mlp.down.weight, {mlp + "down_proj.weight": (hidden, inner)}, transposed=True)
    yield Slot(module.norm.weight, {"model.norm.weight": (hidden,)})
    if module.head is not None:
        yield Slot(module.head, {"lm_head.weight": (config.vocab_size, hidden)}, transposed=True)
