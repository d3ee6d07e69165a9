"""Layers of Whisper: matrices with biases, the layer norm, the convolution, and its two kinds of attention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.models.cache import LayerCache, write_positions
from specsamp_jax.models.layers import normal_param

INIT_STDDEV = 0.02
_NORM_EPS = 1e-5  # of torch's LayerNorm, which config.json does not mention


class KeysValues(NamedTuple):
    """What is attended to: S positions, features before them.

    A CPU multiplies a few queries by this arrangement up to five times as fast as by `[B, S, N, D]`, and all of the
    encoder's more than twice as fast.

    Attributes:
      keys: Keys.
      values: Values.
    """

    keys: Float[Array, "B N D S"]
    values: Float[Array, "B N D S"]


def attend(
    query: Float[Array, "B T N D"], attended: KeysValues, mask: Bool[Array, "B 1 T S"] | None = None
) -> Float[Array, "B T F"]:
    """Returns the values at each query's keys, all heads side by side; the softmax is computed in float32."""
    scores = jnp.einsum("btnd,bnds->bnts", query, attended.keys, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bnts,bnds->btnd", weights, attended.values).reshape(*query.shape[:2], -1)


class Affine(nnx.Module):
    """`x @ weight`, plus a bias on the first `num_biased` features of the product.

    Queries and values have biases and keys have none: those three stand in one matrix, keys last.

    Attributes:
      weight: The matrix, `[in, out]`.
      bias: Of the first features.
      dtype: What the product is computed in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_biased: int | None = None,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.weight = normal_param(rngs.params(), (in_features, out_features), INIT_STDDEV, param_dtype)
        self.bias = nnx.Param(jnp.zeros((out_features if num_biased is None else num_biased,), param_dtype))
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns the product and the bias, in `dtype`."""
        bias = jnp.pad(self.bias[...], (0, self.weight.shape[1] - self.bias.shape[0]))
        return x.astype(self.dtype) @ self.weight[...].astype(self.dtype) + bias.astype(self.dtype)


class LayerNorm(nnx.Module):
    """Layer norm, computed in float32 (Ba et al., 2016, arXiv 1607.06450, equation 4).

    Attributes:
      weight: One gain a feature.
      bias: Added to it.
      dtype: What is returned.
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


class Convolution(nnx.Module):
    """A convolution over time of width 3, padded by one frame on both sides.

    Attributes:
      weight: The kernel.
      bias: One a feature.
      stride: Frames between outputs.
      dtype: What it is computed in.
    """

    def __init__(self, in_features: int, out_features: int, stride: int, *, dtype, param_dtype, rngs):
        self.weight = normal_param(rngs.params(), (out_features, in_features, 3), INIT_STDDEV, param_dtype)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype))
        self.stride, self.dtype = stride, dtype

    def __call__(self, x: Float[Array, "B F I"]) -> Float[Array, "B G O"]:
        """Returns one output for each `stride` frames, in `dtype`."""
        weight = self.weight[...].astype(self.dtype)
        layout = ("NHC", "OIH", "NHC")
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype), weight, (self.stride,), ((1, 1),), dimension_numbers=layout
        )
        return x + self.bias[...].astype(self.dtype)


class SelfAttention(nnx.Module):
    """Attention of a sequence to itself: the encoder's without a cache, the decoder's with one."""

    def __init__(self, num_features: int, num_heads: int, **kwargs):
        self.num_heads = num_heads
        self.query_value_key = Affine(num_features, 3 * num_features, 2 * num_features, **kwargs)
        self.out = Affine(num_features, num_features, **kwargs)

    def __call__(
        self,
        x: Float[Array, "B T F"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B 1 T S"] | None = None,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T F"], LayerCache | None]:
        """Returns what is added to `x`, and the cache with the keys and values of `x` written."""
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

    def __init__(self, num_features: int, num_heads: int, **kwargs):
        self.num_heads = num_heads
        self.query = Affine(num_features, num_features, **kwargs)
        self.value_key = Affine(num_features, 2 * num_features, num_features, **kwargs)
        self.out = Affine(num_features, num_features, **kwargs)

    def read(self, states: Float[Array, "B S F"]) -> KeysValues:
        """Returns the keys and values of the states."""
        heads = self.value_key(states).reshape(*states.shape[:2], 2, self.num_heads, -1)
        value, key = (jnp.transpose(heads[:, :, i], (0, 2, 3, 1)) for i in range(2))
        return KeysValues(key, value)

    def __call__(self, x: Float[Array, "B T F"], cross: KeysValues) -> Float[Array, "B T F"]:
        """Returns what is added to `x`."""
        return self.out(attend(self.query(x).reshape(*x.shape[:2], self.num_heads, -1), cross))


class MLP(nnx.Module):
    """`down(gelu(up(x)))`."""

    def __init__(self, num_features: int, num_inner: int, **kwargs):
        self.up = Affine(num_features, num_inner, **kwargs)
        self.down = Affine(num_inner, num_features, **kwargs)

    def __call__(self, x: Float[Array, "B T F"]) -> Float[Array, "B T F"]:
        """Returns what is added to `x`."""
        return self.down(jax.nn.gelu(self.up(x), approximate=False))
