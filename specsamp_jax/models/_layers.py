"""Layers that the families share: the matrix, the norm, the rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int


def normal_param(key: Array, shape: tuple[int, ...], stddev: float, dtype: DTypeLike) -> nnx.Param:
    """Returns a parameter drawn from a normal distribution around zero."""
    return nnx.Param(stddev * jax.random.normal(key, shape, dtype))


class Linear(nnx.Module):
    """`x @ weight`, without bias.

    The weight is `[in, out]`: with few rows in `x` a CPU multiplies by it up to twice as fast as by `[out, in]`.

    Attributes:
      weight: The matrix.
      dtype: What the product is computed in.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        stddev: float,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.weight = normal_param(rngs.params(), (in_features, out_features), stddev, param_dtype)
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        """Returns the product, in `dtype`."""
        return x.astype(self.dtype) @ self.weight[...].astype(self.dtype)


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32 (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    Attributes:
      weight: One gain a feature, 1 at first.
      eps: Added to the mean square.
      dtype: What is returned.
    """

    def __init__(self, num_features: int, *, eps: float, dtype: DTypeLike, param_dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones((num_features,), param_dtype))
        self.eps = eps
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*B F"]) -> Float[Array, "*B F"]:
        """Returns `x / sqrt(mean(x^2) + eps) * weight`, in `dtype`."""
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale * self.weight[...].astype(jnp.float32)).astype(self.dtype)


def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Returns the cosine and sine of each position's angles, float32, to be used by all heads of all layers.

    Angle i of `head_dim / 2` turns by `theta^(-2 i / head_dim)` a position (Su et al., 2021, arXiv 2104.09864,
    equation 15).
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "B T N D"], cosine: Float[Array, "B T 1 H"], sine: Float[Array, "B T 1 H"]
) -> Float[Array, "B T N D"]:
    """Returns `x` with feature pairs (i, i + D/2) turned by their angles, the Hugging Face convention."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
