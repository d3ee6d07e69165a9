"""Sums and maxima over the vocabulary whose bits depend on the row alone, not on how many rows there are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

SMALL = 8192
"""Below so many elements a row, XLA's CPU backend decides by the size of the whole array how to add and which
exponential to fuse with the addition (seen in jaxlib 0.11.2 and 0.12.0.1, up to 3,000): a row's bits would
depend on its neighbours. Such rows are folded in halves, element by element, in an order written here."""


def row_sum(values: Array, vocab_size: int) -> Array:
    """Sums over the last axis; `vocab_size` is how many elements the row has over all its axes."""
    return values.sum(-1) if vocab_size >= SMALL else _fold(jnp.add, values, 0)


def row_max(values: Array, vocab_size: int) -> Array:
    """Maxima over the last axis. NaN among the values may or may not show: XLA's CPU backend drops it in long rows.

    A maximum has the same bits in any order, but XLA would fuse what follows it, and that has not.
    """
    return values.max(-1) if vocab_size >= SMALL else _fold(jnp.maximum, values, -jnp.inf)


def _fold(fn: Callable[[Array, Array], Array], values: Array, neutral: int | float) -> Array:
    """The last axis folded in halves, after padding it to a power of two."""
    size = values.shape[-1]
    width = 1 << (size - 1).bit_length()
    padding = [(0, 0)] * (values.ndim - 1) + [(0, width - size)]
    values = jnp.pad(values, padding, constant_values=neutral)
    while width > 1:
        width //= 2
        values = fn(values[..., :width], values[..., width:])
    return values[..., 0]


def wide(logits: Array) -> Array:
    """The logits in the type of the arithmetic: float32, or wider where they are."""
    # Not `promote_types`, which promotes no float8.
    return logits.astype(jnp.float32 if jnp.finfo(logits.dtype).bits < 32 else logits.dtype)


def at_least_16_bits(logits: Array) -> Array:
    """The logits; those of float8 and narrower as bfloat16, which holds all their values.

    Some of these types have no infinity to fill a row with, or no order by their bits.
    """
    return logits.astype(jnp.bfloat16) if jnp.finfo(logits.dtype).bits < 16 else logits


def map_rows(fn: Callable[..., Any], logits: Float[Array, "B R V"], *more: Array) -> Any:
    """Returns `fn` of the `[B, V]` logits (and of the `[B]` of each of `more`) of every row, stacked as `[B, R, ...]`.

    On a CPU one row of all sequences after the other, so that at most `[B, V]` is alive at a time: XLA's CPU backend
    fuses no comparison into a reduction. Elsewhere XLA does, and all rows are taken at once.
    """
    if logits.shape[1] == 0:
        shapes = jax.eval_shape(fn, logits[:, :1].sum(1), *(a[:, :1].sum(1) for a in more))
        return jax.tree.map(lambda s: jnp.zeros((s.shape[0], 0, *s.shape[1:]), s.dtype), shapes)

    def one_by_one(*arrays):
        results = lax.map(
            lambda i: fn(*(lax.dynamic_index_in_dim(a, i, 1, keepdims=False) for a in arrays)),
            jnp.arange(logits.shape[1]),
        )
        return jax.tree.map(lambda r: jnp.moveaxis(r, 0, 1), results)

    return lax.platform_dependent(logits, *more, cpu=one_by_one, default=jax.vmap(fn, 1, 1))
