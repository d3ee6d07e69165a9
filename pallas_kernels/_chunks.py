"""Reading a row chunk by chunk, 16 bytes a load whatever V is. A row lies anywhere in a flat array of rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels._rows import LOWEST, NOWHERE, rate


def _read(ref: Any, vocab_size: int, row: jax.Array, chunk: jax.Array, fn: Callable) -> Any:
    """`fn(vectors, singles, places)` of one chunk of a row.

    Vectors begin at multiples of 16 bytes. Where a row does not, or ends inside a chunk, what belongs to its
    neighbours reaches `fn` as -inf; all chunks between are free of masks. `singles` are the scalars of an
    array that ends inside a vector, mostly -inf. `places()` are the places in the row of both.

    Addresses are counted in vectors, and multiplied last: where the compiler does not see that they are
    multiples of a vector, it loads single elements.
    """
    cut = config.chunks(ref.dtype, vocab_size)
    layout = plgpu.Layout.WG_STRIDED((cut.lanes,), vec_size=cut.vec)
    start = row * vocab_size
    end = start + vocab_size
    first_vector = row * (vocab_size // cut.vec) if cut.aligned else start // cut.vec
    low_vector = first_vector + chunk * (cut.num_loads * config.THREADS)

    def load(first, count):
        # HBM -> registers: count vectors of [lanes], 16 bytes a thread each.
        at = [(first + i * config.THREADS) * cut.vec for i in range(count)]
        return [plgpu.load(ref.at[pl.ds(a, cut.lanes)], layout=layout) for a in at]

    def lane():
        return plgpu.broadcasted_iota(jnp.int32, (cut.lanes,), 0, layout=layout)

    def unmasked():
        def places():
            base = low_vector * cut.vec - start
            return [lane() + (base + i * cut.lanes) for i in range(cut.num_loads)], []

        return fn(load(low_vector, cut.num_loads), [], places)

    def masked():
        size = ref.shape[0]
        readable = size // cut.vec
        first = jnp.minimum(low_vector, readable - cut.rest * config.THREADS)
        low = jnp.maximum(low_vector * cut.vec, start)
        high = jnp.minimum((low_vector + cut.num_loads * config.THREADS) * cut.vec, end)
        vectors = load(first, cut.rest)
        base = first * cut.vec
        for i in range(cut.rest):
            at = lane() + (base + i * cut.lanes)
            nothing = plgpu.layout_cast(jnp.full((cut.lanes,), -jnp.inf, ref.dtype), layout)
            vectors[i] = jnp.where((at >= low) & (at < high), vectors[i], nothing)
        # The last elements of an array that ends inside a vector are in its last row's last chunk.
        last = range(readable * cut.vec, size)
        singles = [jnp.where((at >= low) & (at < high), ref[at].astype(jnp.float32), -jnp.inf) for at in last]

        def places():
            inside = [lane() + (base - start + i * cut.lanes) for i in range(cut.rest)]
            return inside, [jnp.int32(at) - start for at in last]

        return fn(vectors, singles, places)

    if cut.rest == 0:
        return unmasked()
    whole = chunk < cut.whole if cut.aligned else (chunk > 0) & (chunk < cut.whole)
    return lax.cond(whole, unmasked, masked) if cut.whole > (not cut.aligned) else masked()


def log_sum(
    ref: Any, vocab_size: int, row: jax.Array, chunk: jax.Array, scale: Any, cutoff: Any
) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a chunk, and the sum of kept exp((x - largest) * scale).

    Not finite where the chunk holds NaN or +inf. All -inf: `LOWEST` and 0.
    """

    def fold(vectors, singles, places):
        del places
        top = jnp.max(functools.reduce(jnp.maximum, vectors).astype(jnp.float32))
        top = functools.reduce(jnp.maximum, singles, jnp.maximum(top, LOWEST))

        def weight(x):
            w = jnp.exp2((x - top) * rate(scale))
            return w if cutoff is None else jnp.where(x >= cutoff, w, 0.0)

        total = jnp.sum(functools.reduce(jnp.add, [weight(x.astype(jnp.float32)) for x in vectors]))
        return top, functools.reduce(jnp.add, map(weight, singles), total)

    return _read(ref, vocab_size, row, chunk, fold)


def first_largest(ref: Any, vocab_size: int, row: jax.Array, chunk: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a chunk and its first place; NaN and no place where there is a NaN."""

    def fold(vectors, singles, places):
        vectors = [x.astype(jnp.float32) for x in vectors]
        top = functools.reduce(jnp.maximum, singles, jnp.max(functools.reduce(jnp.maximum, vectors)))
        at, single_at = places()
        first = jnp.min(
            functools.reduce(jnp.minimum, [jnp.where(x == top, a, NOWHERE) for x, a in zip(vectors, at, strict=True)])
        )
        for x, a in zip(singles, single_at, strict=True):
            first = jnp.minimum(first, jnp.where((x == top) & (a >= 0), a, NOWHERE))
        return top, first

    return _read(ref, vocab_size, row, chunk, fold)
