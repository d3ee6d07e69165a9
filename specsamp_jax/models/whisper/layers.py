"""Layers of Whisper: a partly biased matrix, the layer norm, self-attention and cross-attention."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import export
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.models.cache import LayerCache, write_positions
from specsamp_jax.models.layers import linear, normal_param

INIT_STDDEV = 0.02
_NORM_EPS = 1e-5  # default of torch's LayerNorm; config.json does not hold it


class KeysValues(NamedTuple):
    """Keys and values of S positions, features before positions.

    A CPU multiplies a few queries by this arrangement up to five times as fast as by `[B, S, N, D]`, and all of the
    encoder's more than twice as fast.

    Attributes:
      keys: Keys.
      values: Values.
    """

    keys: Float[Array, "B N D S"]
    values: Float[Array, "B N D S"]


export.register_namedtuple_serialization(KeysValues, serialized_name="specsamp_jax.KeysValues")


def attend(
    query: Float[Array, "B T N D"], attended: KeysValues, mask: Bool[Array, "B 1 T S"] | None = None
) -> Float[Array, "B T F"]:
    """Returns scaled dot-product attention with the heads concatenated; the softmax is computed in float32."""
    weights = attention_weights(query, attended.keys, mask).astype(query.dtype)
    return jnp.einsum("bnts,bnds->btnd", weights, attended.values).reshape(*query.shape[:2], -1)


def attention_weights(
    query: Float[Array, "B T N D"], keys: Float[Array, "B N D S"], mask: Bool[Array, "B 1 T S"] | None = None
) -> Float[Array, "B N T S"]:
    """Returns the weight of each position for each query, float32; they sum to 1 over S."""
    scores = jnp.einsum("btnd,bnds->bnts", query, keys, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


class PartlyBiasedLinear(nnx.Module):
    """`x @ kernel`, plus a bias on the first `num_biased` features of the product.

    Own code, because `nnx.Linear` has a bias on all features or on none: queries and values have biases and keys have
    none, and the three are one matrix, keys last.

    Attributes:
      kernel: The matrix, `[in, out]`.
      bias: Bias of the first features; 0 at first.
      dtype: Dtype of the product.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_biased: int,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.kernel = normal_param(rngs.params(), (in_features, out_features), INIT_STDDEV, param_dtype)
        self.bias = nnx.Param(jnp.zeros((num_biased,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns the product and the bias, in `dtype`."""
        bias = jnp.pad(self.bias[...], (0, self.kernel.shape[1] - self.bias.shape[0]))
        return x.astype(self.dtype) @ self.kernel[...].astype(self.dtype) + bias.astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm, computed in float32 (Ba et al., 2016, arXiv 1607.06450, equation 4).

    Own code: `nnx.LayerNorm` multiplies the gain by the scale before `x`, and rounds gain and bias to `dtype` first,
    so that its results differ in the last bits.

    Attributes:
      weight: One gain per feature.
      bias: One bias per feature.
      dtype: Dtype of the result.
    """

    def __init__(self, num_features: int, *, dtype: DTypeLike, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((num_features,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((num_features,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """Returns `(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias`, in `dtype`."""
        x = x.astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + _NORM_EPS)
        return (x * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(self.dtype)


class SelfAttention(nnx.Module):
    """Attention of a sequence to itself: the encoder's without a cache, the decoder's with one."""

    def __init__(self, num_features: int, num_heads: int, **kwargs: Any):
        self.num_heads = num_heads
        self.query_value_key = PartlyBiasedLinear(num_features, 3 * num_features, 2 * num_features, **kwargs)
        self.out = _linear(num_features, num_features, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B T F"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B 1 T S"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns the output, to be added to `x`, and the cache with the keys and values of `x` written."""
        heads = self.query_value_key(x).reshape(*x.shape[:2], 3, self.num_heads, -1)
        query, value, key = (heads[:, :, i] for i in range(3))
        if cache is not None and positions is not None:
            cache = LayerCache(
                write_positions(cache.keys, key, positions), write_positions(cache.values, value, positions)
            )
            key, value = cache
        key, value = (jnp.transpose(heads, (0, 2, 3, 1)) for heads in (key, value))
        return self.out(attend(query, KeysValues(key, value), mask)), cache


class CrossAttention(nnx.Module):
    """Attention of text to the encoder's states."""

    def __init__(self, num_features: int, num_heads: int, **kwargs: Any):
        self.num_heads = num_heads
        self.query = _linear(num_features, num_features, **kwargs)
        self.value_key = PartlyBiasedLinear(num_features, 2 * num_features, num_features, **kwargs)
        self.out = _linear(num_features, num_features, **kwargs)

    def read(self, states: Float[Array, "B S F"]) -> KeysValues:
        """Returns the keys and values of the states."""
        heads = self.value_key(states).reshape(*states.shape[:2], 2, self.num_heads, -1)
        value, key = (jnp.transpose(heads[:, :, i], (0, 2, 3, 1)) for i in range(2))
        return KeysValues(key, value)

    def __call__(self, x: Float[Array, "B T F"], cross: KeysValues) -> Float[Array, "B T F"]:
        """Returns the output, to be added to `x`."""
        return self.out(attend(self._queries(x), cross))

    def weights(self, x: Float[Array, "B T F"], cross: KeysValues) -> Float[Array, "B N T S"]:
        """Returns the weight of each state for each token, float32."""
        return attention_weights(self._queries(x), cross.keys)

    def _queries(self, x: Float[Array, "B T F"]) -> Float[Array, "B T N D"]:
        return self.query(x).reshape(*x.shape[:2], self.num_heads, -1)


class MLP(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, num_features: int, num_inner: int, **kwargs: Any):
        self.up = _linear(num_features, num_inner, **kwargs)
        self.down = _linear(num_inner, num_features, **kwargs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns the output, to be added to `x`."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))


def _linear(in_features: int, out_features: int, **kwargs: Any) -> nnx.Linear:
    return linear(in_features, out_features, bias=True, stddev=INIT_STDDEV, **kwargs)
