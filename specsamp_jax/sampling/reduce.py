"""Sums and maxima over the vocabulary whose bits depend on the row alone, not on the batch size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from specsamp_jax.sampling.mesh_axes import vary_like

SMALL = 8192
"""Rows with fewer elements than this are folded in halves, in an order that this module fixes.

For small rows XLA's CPU backend chooses the order of additions, and the exponential that it fuses with them, by the
size of the whole array (seen in jaxlib 0.11.2 and 0.12.0.1, up to 3,000 elements): a row's bits would depend on the
other rows."""


SHORTEST_CHUNK = 8000
"""Sums of this many elements have one order in any array. Of 4,000 they do not, without an exponential before them."""


def num_chunks(size: int) -> int:
    """The largest power of two that divides a row of this size into chunks of `SHORTEST_CHUNK` elements or more."""
    chunks = 1
    while size % (2 * chunks) == 0 and size >= 2 * chunks * SHORTEST_CHUNK:
        chunks *= 2
    return chunks


def row_sum(values: Array, vocab_size: int) -> Array:
    """Sums over the last axis; `vocab_size` is the number of elements of a row over all its axes.

    A long row is added up in `num_chunks` chunks. Where the vocabulary is sharded over devices whose number divides
    that of the chunks, no chunk is on two devices, so that the sum has the bits of one device, and one number per chunk
    is sent. More chunks also keep more cores busy.
    """
    if vocab_size < SMALL:
        return _fold(jnp.add, values, 0)

    def by_chunks(values):
        size = values.shape[-1]
        chunks = num_chunks(size)
        return _fold(jnp.add, values.reshape(*values.shape[:-1], chunks, size // chunks).sum(-1), 0)

    # On a TPU, chunks that are no multiple of a vector would be written to memory.
    return lax.platform_dependent(values, tpu=lambda values: values.sum(-1), default=by_chunks)


def row_max(values: Array, vocab_size: int) -> Array:
    """Maxima over the last axis. The result of a row with NaN is undefined: XLA's CPU backend drops NaN in long rows.

    A maximum has the same bits in any order, but XLA would fuse it with the operations after it, whose bits depend
    on the order.
    """
    return values.max(-1) if vocab_size >= SMALL else _fold(jnp.maximum, values, -jnp.inf)


def _fold(fn: Callable[[Array, Array], Array], values: Array, neutral: int | float) -> Array:
    """Reduces the last axis by folding it in halves, after padding it to a power of two."""
    size = values.shape[-1]
    width = 1 << (size - 1).bit_length()
    padding = [(0, 0)] * (values.ndim - 1) + [(0, width - size)]
    values = jnp.pad(values, padding, constant_values=neutral)
    while width > 1:
        width //= 2
        values = fn(values[..., :width], values[..., width:])
    return values[..., 0]


def wide(logits: Array) -> Array:
    """The logits in the dtype of the arithmetic: float32, or their own dtype if that is wider."""
    # Not `promote_types`, which does not promote float8.
    return logits.astype(jnp.float32 if jnp.finfo(logits.dtype).bits < 32 else logits.dtype)


def at_least_16_bits(logits: Array) -> Array:
    """The logits, converted to bfloat16 if their dtype is float8 or narrower; bfloat16 represents all their values.

    Some of the narrow types have no infinity to mask with, or do not sort by their bits.
    """
    return logits.astype(jnp.bfloat16) if jnp.finfo(logits.dtype).bits < 16 else logits


def map_rows(fn: Callable[..., Any], logits: Float[Array, "B R V"], *more: Array) -> Any:
    """Maps `fn` over axis 1 of all arguments and stacks its results as `[B, R, ...]`.

    `fn` takes logits `[B, V]` and a `[B]` from each array of `more`. On a CPU the R calls run one after the other, so
    that at most one `[B, V]` temporary is alive: XLA's CPU backend fuses no comparison into a reduction. On other
    platforms it does, and `fn` is vectorised over R.
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

    # JAX cannot vectorise a cast to more mesh axes in a branch of `fn`: all arrays vary over the same ones before.
    arrays = vary_like((logits, *more), (logits, *more))
    return lax.platform_dependent(*arrays, cpu=one_by_one, default=jax.vmap(fn, 1, 1))
