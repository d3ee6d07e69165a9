"""Layers that the families share: the vocabulary, the matrix and the norm."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def normal_param(key: Array, shape: tuple[int, ...], stddev: float, dtype: DTypeLike) -> nnx.Param:
    """Returns a parameter drawn from a normal distribution around zero."""
    return nnx.Param(stddev * jax.random.normal(key, shape, dtype))


class Vocabulary(nnx.Module):
    """What a token is to the model, and how likely each is to it: the embedding and the head.

    Attributes:
      embedding: One row a token; None where it is the head's transpose.
      head: The head, `[features, tokens]`: with few positions a CPU multiplies by it up to twice as fast as by
        `[tokens, features]`, and columns are looked up as quickly as rows.
      dtype: What the product is computed in.
    """

    def __init__(
        self,
        vocab_size: int,
        num_features: int,
        *,
        tied: bool,
        stddev: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        size = vocab_size, num_features
        self.embedding = None if tied else normal_param(rngs.params(), size, stddev, param_dtype)
        self.head = normal_param(rngs.params(), size[::-1], stddev, param_dtype)
        self.dtype = dtype

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T F"]:
        """Returns what each token is, in `dtype`; one outside the vocabulary is read as the nearest within."""
        nearest: dict[str, Any] = {"mode": "clip", "wrap_negative_indices": False}
        if self.embedding is not None:
            return self.embedding[...].at[tokens].get(**nearest).astype(self.dtype)
        return jnp.moveaxis(self.head[...].at[:, tokens].get(**nearest), 0, -1).astype(self.dtype)

    def logits(self, x: Float[Array, "B T F"]) -> Float[Array, "B T V"]:
        """Returns one logit a token, float32."""
        return jnp.einsum("btd,dv->btv", x, self.head[...].astype(self.dtype), preferred_element_type=jnp.float32)


class Linear(nnx.Module):
    """`x @ weight + bias`.

    The weight is `[in, out]`: with few rows in `x` a CPU multiplies by it up to twice as fast as by `[out, in]`.

    Attributes:
      weight: The matrix.
      bias: The vector, 0 at first, or None.
      dtype: What the product is computed in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        stddev: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.weight = normal_param(rngs.params(), (in_features, out_features), stddev, param_dtype)
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns the result, in `dtype`."""
        product = x.astype(self.dtype) @ self.weight[...].astype(self.dtype)
        return product if self.bias is None else product + self.bias[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32 (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    Attributes:
      weight: One gain a feature, less `offset`; the gain is 1 at first.
      eps: Added to the mean square.
      offset: Added to the weight; 1 in Gemma.
      dtype: What is returned.
    """

    def __init__(self, num_features: int, *, eps: float, offset: float = 0.0, dtype: DTypeLike, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.full((num_features,), 1 - offset, param_dtype))
        self.eps, self.offset = eps, offset
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """Returns `x / sqrt(mean(x^2) + eps) * (weight + offset)`, in `dtype`."""
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale * (self.weight[...].astype(jnp.float32) + self.offset)).astype(self.dtype)
