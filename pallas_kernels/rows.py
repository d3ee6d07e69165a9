"""Rows of logits inside a kernel: their arrays and filters, loads of single logits, reductions over a row."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config, tiles
from pallas_kernels.random import ROUND_PARTS, Draws, Noise
from pallas_kernels.types import ROUNDS, TILE, Filter

LOG2_E = 1 / math.log(2)
"""exp(x) = exp2(x * LOG2_E); exp2 is a single instruction."""

LOWEST = float(jnp.finfo(jnp.float32).min)
"""Initial value of a running maximum: finite, so that -inf minus the maximum is not NaN."""

MAX_INDEX = 2**31 - 1
"""Largest int32, greater than every index."""


class LogitRows(NamedTuple):
    """All rows of logits of one model, `[B * R * V]`, and their filter, with booleans as int32."""

    logits: Any
    filter: Filter


class Inputs(NamedTuple):
    """Inputs of a rule's kernels. Absent ones are None; with K = 0 only `target` and `draws.emit` are present."""

    target: LogitRows
    draft: LogitRows | None
    log_normalizers: Any
    draft_tokens: Any
    draws: Draws

    @property
    def logits(self) -> list[Any]:
        """The logits of the target, and of the draft if it has any."""
        return [rows.logits for rows in (self.target, self.draft) if rows is not None]


def make_inputs(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    log_normalizers: Float[Array, "B K"] | None,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
) -> Inputs:
    """Casts the small inputs to the dtypes of the kernels, and flattens the logits without a copy."""

    def cast(x, dtype: Any = jnp.float32):
        return None if x is None else x.astype(dtype)

    def flat(logits, filter):
        filter = Filter(cast(filter.scale), cast(filter.cutoff), cast(filter.greedy, jnp.int32))
        return LogitRows(logits.reshape(-1), filter)

    target, num_draft = flat(target_logits, target_filter), draft_tokens.shape[1]
    if not isinstance(draws, Noise):
        rounds = draws.rounds
        if rounds is not None and rounds.shape[2] != ROUNDS:
            raise NotImplementedError(f"kernels take uniforms of {ROUNDS} rounds; got {rounds.shape[2]}")
        if rounds is not None:
            rounds = rounds.astype(jnp.float32).reshape(rounds.shape[0], 3 * ROUNDS)
            rounds = jnp.pad(rounds, ((0, 0), (0, ROUND_PARTS * config.THREADS - 3 * ROUNDS)))
            rounds = rounds.reshape(-1, ROUND_PARTS, config.THREADS)
        draws = draws._replace(accept=cast(draws.accept) if num_draft else None, emit=cast(draws.emit), rounds=rounds)
    if num_draft == 0:
        return Inputs(target, None, None, None, draws)
    has_draft = draft_logits is not None
    return Inputs(
        target,
        flat(draft_logits, draft_filter) if has_draft else None,
        cast(log_normalizers) if has_draft else None,
        cast(draft_tokens, jnp.int32),
        draws,
    )


class Rows(NamedTuple):
    """Rows of one model and one sequence, in a kernel.

    Attributes:
      logits: All rows of all sequences, `[B * R * V]`.
      filter: Scale `[B]`, cutoff `[B, R]`, greedy `[B]`, or None.
      num_rows: R.
      vocab_size: V.
      sequence: Index of the sequence.
    """

    logits: Any
    filter: Filter
    num_rows: int
    vocab_size: int
    sequence: jax.Array

    @property
    def num_chunks(self) -> int:
        """Chunks per row."""
        return config.chunks(self.logits.dtype, self.vocab_size).count


class Sequence(NamedTuple):
    """One sequence, in a kernel: its index, views of its rows, and the inputs of all sequences."""

    number: jax.Array
    target: Rows
    draft: Rows | None
    inputs: Inputs
    num_draft: int

    def draft_row(self, row: Any) -> Any:
        """Index of the draft's row for a target row; the last one for the bonus row."""
        return jnp.minimum(row, max(self.num_draft - 1, 0))


def sequence_view(inputs: Inputs, vocab_size: int, number: Any = None) -> Sequence:
    """The sequence at index `number`. None: the index of this block on grid axis "sequence"."""
    num_draft = 0 if inputs.draft_tokens is None else inputs.draft_tokens.shape[1]
    number = lax.axis_index("sequence") if number is None else number
    target = Rows(*inputs.target, num_draft + 1, vocab_size, number)
    draft = None if inputs.draft is None else Rows(*inputs.draft, num_draft, vocab_size, number)
    return Sequence(number, target, draft, inputs, num_draft)


def flat_row(rows: Rows, row: Any) -> jax.Array:
    """Index of a row among the rows of all sequences."""
    return rows.sequence * rows.num_rows + row


def scale_of(rows: Rows) -> jax.Array | float | None:
    """The filter's scale of the sequence; None for 1."""
    scale = rows.filter.scale
    return scale if scale is None or isinstance(scale, float) else scale[rows.sequence]


def cutoff_of(rows: Rows, row: Any) -> jax.Array | None:
    """The filter's cutoff of one row; None if nothing is cut."""
    return None if rows.filter.cutoff is None else rows.filter.cutoff[rows.sequence, row]


def exp2_rate(scale: jax.Array | float | None) -> Any:
    """Factor c such that exp2(c * x) = exp(scale * x); a scale of None is 1."""
    return LOG2_E if scale is None else scale * LOG2_E


def is_finite(x: jax.Array) -> jax.Array:
    """Whether x is finite, in one comparison."""
    return jnp.abs(x) < jnp.inf


def load_logit(rows: Rows, row: Any, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loads the logit of one token; also returns whether it is outside the vocabulary or filtered out."""
    outside = (token < 0) | (token >= rows.vocab_size)
    x = rows.logits[flat_row(rows, row) * rows.vocab_size + jnp.where(outside, 0, token)].astype(jnp.float32)
    cutoff = cutoff_of(rows, row)
    return x, outside if cutoff is None else outside | (x < cutoff)


def log_prob(rows: Rows, logit: jax.Array, offset: jax.Array, log_sum: jax.Array) -> jax.Array:
    """Log-probability of a logit, at most 0: `(logit - offset) * scale - log_sum`; -inf in a degenerate row."""
    scale = scale_of(rows)
    value = logit - offset
    value = (value if scale is None else value * scale) - log_sum
    value = jnp.where(is_finite(offset + log_sum), value, -jnp.inf)
    return jnp.minimum(value, 0.0)


def prob(rows: Rows, row: Any, logits: jax.Array, offset: jax.Array, log_sum: jax.Array) -> jax.Array:
    """`[TILE]` probabilities of logits, float32: exp((x - offset) * scale - log_sum) where x >= cutoff, else 0."""
    scale, cutoff = scale_of(rows), cutoff_of(rows, row)
    # Compiles to one subtraction, one fused multiply-add and one exponential.
    x = logits.astype(jnp.float32)
    p = jnp.exp2((x - offset) * exp2_rate(scale) - log_sum * LOG2_E)
    return p if cutoff is None else jnp.where(x >= cutoff, p, 0.0)


def load_tiles(rows: list[tuple[Rows, Any]], number: Any) -> tuple[tiles.Tile, list[jax.Array]]:
    """Loads tile `number` of each of `rows`, pairs of a model's rows and the index of a row."""
    flat = [(model.logits, flat_row(model, row)) for model, row in rows]
    vocab_size = rows[0][0].vocab_size
    tile = tiles.locate_tile(number, vocab_size, flat)
    return tile, [tiles.load_tile(ref, vocab_size, row, tile) for ref, row in flat]


def fold_tiles(rows: Rows, row: Any, fn: Any, start: tuple[Any, ...]) -> tuple[jax.Array, ...]:
    """Folds `fn(tile, logits, carry)` over the tiles of a row, one by one: slow, but with few registers."""
    first, _ = load_tiles([(rows, row)], jnp.int32(0))

    def step(number, carry):
        tile, (x,) = load_tiles([(rows, row)], number)
        return fn(tile, x, carry)

    carry = tuple(plgpu.layout_cast(jnp.full((TILE,), value), first.layout) for value in start)
    return lax.fori_loop(0, config.num_tiles(rows.vocab_size), step, carry)


def first_largest_number(rows: Rows, row: Any) -> jax.Array:
    """Index of the first largest logit of a row, NaN ignored; 0 if there is none above -inf."""

    def step(tile, x, carry):
        top, first = carry
        x = tiles.mask_tile(x.astype(jnp.float32), tile, -jnp.inf)
        x = jnp.where(x == x, x, -jnp.inf)
        return jnp.maximum(top, x), jnp.where(x > top, tile.indices(), first)

    tops, indices = fold_tiles(rows, row, step, (-jnp.inf, 0))
    top = jnp.max(tops)
    return jnp.where(top > -jnp.inf, jnp.min(jnp.where(tops == top, indices, MAX_INDEX)), 0)


def row_log_sum(rows: Rows, row: Any) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a row, and the logsumexp of kept `(logit - largest) * scale`, computed by one block."""
    scale, cutoff = scale_of(rows), cutoff_of(rows, row)
    rate = exp2_rate(scale)

    def step(tile, x, carry):
        top, total = carry
        x = tiles.mask_tile(x.astype(jnp.float32), tile, -jnp.inf)
        new_top = jnp.maximum(top, x)
        weight = jnp.exp2((x - new_top) * rate)
        weight = weight if cutoff is None else jnp.where(x >= cutoff, weight, 0.0)
        return new_top, total * jnp.exp2((top - new_top) * rate) + weight

    tops, totals = fold_tiles(rows, row, step, (LOWEST, 0.0))
    top = jnp.max(tops)
    return top, jnp.log(jnp.sum(totals * jnp.exp2((tops - top) * rate)))


def chunk_log_sum(
    rows: Rows, row: Any, flat: Any, chunk: Any, sum_fn: Callable[[list[jax.Array], jax.Array], jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a chunk, and the sum of kept exp((x - largest) * scale); `flat` is the row's `flat_row`.

    Not finite if the chunk holds NaN or +inf; `LOWEST` and 0 if the whole chunk is -inf. `sum_fn(weights, largest)`,
    if given, sums the vectors of weights.
    """
    scale, cutoff = scale_of(rows), cutoff_of(rows, row)

    def sum_all(weights, top):
        del top
        return jnp.sum(functools.reduce(jnp.add, weights))

    def fold(vectors, scalars, indices_fn):
        del indices_fn
        top = jnp.max(functools.reduce(jnp.maximum, vectors).astype(jnp.float32))
        top = functools.reduce(jnp.maximum, scalars, jnp.maximum(top, LOWEST))

        def weight(x):
            w = jnp.exp2((x - top) * exp2_rate(scale))
            return w if cutoff is None else jnp.where(x >= cutoff, w, 0.0)

        total = (sum_fn or sum_all)([weight(x.astype(jnp.float32)) for x in vectors], top)
        return top, functools.reduce(jnp.add, map(weight, scalars), total)

    return tiles.read_chunk(rows.logits, rows.vocab_size, flat, chunk, fold)


def chunk_first_largest(rows: Rows, flat: Any, chunk: Any) -> tuple[jax.Array, jax.Array]:
    """Largest logit of a chunk and its first index; NaN and `MAX_INDEX` if the chunk holds NaN."""

    def fold(vectors, scalars, indices_fn):
        vectors = [x.astype(jnp.float32) for x in vectors]
        top = functools.reduce(jnp.maximum, scalars, jnp.max(functools.reduce(jnp.maximum, vectors)))
        indices, scalar_indices = indices_fn()
        largest = [jnp.where(x == top, i, MAX_INDEX) for x, i in zip(vectors, indices, strict=True)]
        first = jnp.min(functools.reduce(jnp.minimum, largest))
        for x, i in zip(scalars, scalar_indices, strict=True):
            first = jnp.minimum(first, jnp.where((x == top) & (i >= 0), i, MAX_INDEX))
        return top, first

    return tiles.read_chunk(rows.logits, rows.vocab_size, flat, chunk, fold)
