"""Layers that several models share: the vocabulary, the matrix and the norm."""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

_BLOCK = 8  # rows of a matrix that are read at once; 4 and 12 are about as fast, 16 is a quarter as fast
_LARGE = 1 << 22  # elements of the smallest matrix that `_row_product` reads: its loop makes a program larger
# XLA spreads a product over all cores, but a loop with few columns over none. Two cores were measured.
_MOST_CORES = 4


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def linear(in_features: int, out_features: int, *, bias: bool = False, stddev: float, **kwargs: Any) -> nnx.Linear:
    """Returns `x @ kernel + bias`, with a kernel `[in, out]` drawn from a normal distribution.

    A CPU multiplies few rows by this arrangement up to twice as fast as by `[out, in]`.

    Args:
      in_features: Features of `x`.
      out_features: Features of the product.
      bias: Whether there is a bias; it is 0 at first.
      stddev: Standard deviation of the kernel at first.
      **kwargs: `dtype` (of the computation), `param_dtype` and `rngs` of `nnx.Linear`.
    """
    init = nnx.initializers.normal(stddev)
    return nnx.Linear(in_features, out_features, use_bias=bias, kernel_init=init, dot_general=product, **kwargs)


def product(lhs: Array, rhs: Float[Array, "F N"], dimension_numbers: Any, **options: Any) -> Array:
    """Returns `lax.dot_general` of rows and a matrix; on a CPU faster for a single row of 16 bits.

    For such a row XLA's CPU backend converts the whole matrix to float32 first, which takes ten times as long as the
    product of two rows. There, with at most four cores, a large matrix whose F is a multiple of 8 is read by
    `_row_product`; by others, and under `shard_map` or explicit sharding, the row is multiplied twice.
    """
    dot = functools.partial(jax.lax.dot_general, dimension_numbers=dimension_numbers, **options)
    if lhs.dtype.itemsize > 2 or math.prod(lhs.shape[:-1]) != 1:
        return dot(lhs, rhs)

    def two_rows(lhs, rhs):
        return dot(jnp.concatenate([lhs, lhs]), rhs)[:1]

    def row(lhs, rhs):
        dtype = jax.eval_shape(dot, lhs, rhs).dtype
        return _row_product(lhs.reshape(-1), rhs).astype(dtype).reshape(*lhs.shape[:-1], -1)

    in_blocks = rhs.size >= _LARGE and rhs.shape[0] % _BLOCK == 0 and _num_cores() <= _MOST_CORES
    # The sums of a loop have one type before it and in it, and the type of an array says how it is sharded there.
    in_blocks &= not _has_typed_axes(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cpu=row if in_blocks else two_rows, default=dot)


def _has_typed_axes(*arrays: Array) -> bool:
    """Whether mesh axes of the arrays are explicit, or manual as inside `shard_map`, so that types name them."""
    return any(kind != AxisType.Auto for array in arrays for kind in jax.typeof(array).sharding.mesh.axis_types)


def _row_product(x: Float[Array, "F"], matrix: Float[Array, "F N"]) -> Float[Array, "1 N"]:
    """Returns `x[None] @ matrix`, with sums in float32 in the order of the features.

    A few rows of the matrix at a time are converted, multiplied and added in registers, in one pass over the sums.
    XLA's CPU backend makes one vectorised loop of it, which reads bfloat16 two to four times as fast as its products.
    """

    def add(i, sums):
        start = i * _BLOCK
        block = jax.lax.dynamic_slice_in_dim(matrix, start, _BLOCK).astype(jnp.float32)
        factors = jax.lax.dynamic_slice_in_dim(x, start, _BLOCK).astype(jnp.float32)
        products = block * factors[:, None]
        for j in range(_BLOCK):
            sums = sums + products[j : j + 1]
        return sums

    # With an unsigned index there are no operations that wrap negative indices.
    first, end = jnp.uint32(0), jnp.uint32(x.size // _BLOCK)
    return jax.lax.fori_loop(first, end, add, jnp.zeros((1, matrix.shape[1]), jnp.float32))


class Vocabulary(nnx.Module):
    """Embedding of tokens, and the head that gives their logits.

    Attributes:
      embedding: One row per token, `[tokens, features]`; None where it is the transposed head. Of one dimension if a
        checkpoint left it in its file: then the rows are its last values. See `checkpoints.in_file`.
      head: The head, `[features, tokens]`: with few positions a CPU multiplies by it up to twice as fast as by
        `[tokens, features]`, and columns are looked up as quickly as rows.
      dtype: Dtype of the product.
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
        """Returns the embedding of each token, in `dtype`; an id outside the vocabulary is read as the nearest one."""
        nearest: dict[str, Any] = {"mode": "clip", "wrap_negative_indices": False}
        if self.embedding is not None:
            table = self.embedding[...]
            if table.ndim == 1:
                width, num_rows = self.head.shape
                return _last_rows(table, num_rows, width, tokens).astype(self.dtype)
            return table.at[tokens].get(**nearest).astype(self.dtype)
        return jnp.moveaxis(self.head[...].at[:, tokens].get(**nearest), 0, -1).astype(self.dtype)

    def logits(self, x: Float[Array, "B T F"]) -> Float[Array, "B T V"]:
        """Returns the logits of all tokens, float32."""
        head = self.head[...].astype(self.dtype)
        return product(x, head, (((2,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def _last_rows(values: Float[Array, "N"], num_rows: int, width: int, ids: Int[Array, "B T"]) -> Float[Array, "B T F"]:
    """Rows of the matrix at the end of `values`; an id outside it is read as the nearest one."""
    starts = values.size - num_rows * width + width * jnp.clip(ids, 0, num_rows - 1)
    return jax.vmap(jax.vmap(lambda start: jax.lax.dynamic_slice_in_dim(values, start, width)))(starts)


class RMSNorm(nnx.Module):
    """Root mean square norm, computed in float32 (Zhang and Sennrich, 2019, arXiv 1910.07467, equation 4).

    Own code: `nnx.RMSNorm` has no offset, and multiplies the gain by the scale before `x`, which rounds differently.

    Attributes:
      weight: One gain per feature, less `offset`; the gain is 1 at first.
      eps: Added to the mean square.
      offset: Added to the weight; 1 in Gemma.
      dtype: Dtype of the result.
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


def normal_param(key: Array, shape: tuple[int, ...], stddev: float, dtype: DTypeLike) -> nnx.Param:
    """Returns a parameter drawn from a normal distribution with mean 0."""
    return nnx.Param(stddev * jax.random.normal(key, shape, dtype))
