"""Reading rows before drafts are decided on: a maximum and a sum per chunk, and the logits of the drafted tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import config, rows, tiles
from pallas_kernels.types import LARGEST_LOG_NORMALIZER


class ChunkStats(NamedTuple):
    """Statistics of chunks of rows in global memory, in one of two layouts.

    `[B, chunks, lanes]`, one row per lane (`config.row_lanes`), serves decisions on all rows at once.
    `[B, rows, lanes]`, one chunk per lane, serves decisions on one row.

    Attributes:
      top: Largest logit.
      total: Sum of exponentials beside it, of rows that are not greedy.
      first: Index of the largest logit, of greedy rows.
    """

    top: Any
    total: Any
    first: Any


class Facts(NamedTuple):
    """One value per drafted token, each `[B, lanes]` in global memory with one row per lane.

    Attributes:
      token: -1 from where nothing was drafted.
      target_logit: -inf where the token is outside of the vocabulary or filtered out.
      draft_logit: Likewise, under the draft.
      accept: The uniform.
      q_offset, q_log_sum: The normalizer of the draft's row, where normalizers were handed over.
    """

    token: Any
    target_logit: Any
    draft_logit: Any
    accept: Any
    q_offset: Any
    q_log_sum: Any


def _stats_types(shape: tuple[int, ...]) -> ChunkStats:
    return ChunkStats(*(jax.ShapeDtypeStruct(shape, dtype) for dtype in (jnp.float32, jnp.float32, jnp.int32)))


def stats_by_chunk(batch_size: int, num_rows: int, logits: jax.Array, vocab_size: int) -> ChunkStats:
    """Types of statistics with one row per lane."""
    num_chunks = config.chunks(logits.dtype, vocab_size).count
    return _stats_types((batch_size, num_chunks, config.row_lanes(num_rows)))


def stats_by_row(batch_size: int, num_rows: int, logits: jax.Array, vocab_size: int) -> ChunkStats:
    """Types of statistics with one chunk per lane."""
    num_chunks = config.chunks(logits.dtype, vocab_size).count
    return _stats_types((batch_size, num_rows, config.to_lanes(num_chunks)))


def load_row_stats(of: rows.Rows, stats: ChunkStats, row: Any) -> tuple[jax.Array, jax.Array]:
    """Maxima and sums of the chunks of one row, one chunk per lane; -inf and 0 after the last chunk."""
    index = of.sequence, row
    tops = tiles.load_first_lanes(stats.top, index, of.num_chunks, -jnp.inf)
    return tops, tiles.load_first_lanes(stats.total, index, of.num_chunks, 0.0)


def facts_types(batch_size: int, num_rows: int) -> Facts:
    """Types of the facts."""
    shape = batch_size, config.row_lanes(num_rows)
    return Facts(jax.ShapeDtypeStruct(shape, jnp.int32), *(jax.ShapeDtypeStruct(shape, jnp.float32),) * 5)


def reads_draft(inputs: rows.Inputs) -> bool:
    """Whether the draft's rows have to be read: no normalizers were handed over."""
    return inputs.draft is not None and inputs.log_normalizers is None


Write = Callable[[Callable[[ChunkStats], Any], Any], None]
"""Writes one statistic, `write(lambda stats: stats.top, value)`, wherever a chunk's statistics go."""


def write_to(*destinations: tuple[ChunkStats, tuple[Any, ...]]) -> Write:
    """The `Write` to each of some statistics at an index."""

    def write(field, value):
        for stats, index in destinations:
            field(stats)[index] = value

    return write


def read_draft(of: rows.Rows, row: Any, chunk: Any, write: Write):
    """Reads a chunk of a draft row, and writes its maximum and its sum."""
    _read_soft(of, row, rows.flat_row(of, row), chunk, write)


def _read_soft(of: rows.Rows, row: Any, flat: Any, chunk: Any, write: Write):
    top, total = rows.chunk_log_sum(of, row, flat, chunk)
    write(lambda stats: stats.top, top)
    write(lambda stats: stats.total, total)


def read_target(of: rows.Rows, row: Any, chunk: Any, write: Write):
    """Reads a chunk of a target row; of a greedy one the first largest logit is enough."""
    # Computed once, before the branches.
    flat = rows.flat_row(of, row)

    def read_greedy():
        top, first = rows.chunk_first_largest(of, flat, chunk)
        write(lambda stats: stats.top, top)
        write(lambda stats: stats.first, first)

    greedy = of.filter.greedy
    if greedy is None:
        _read_soft(of, row, flat, chunk, write)
    else:
        pl.when(greedy[of.sequence] > 0)(read_greedy)
        pl.when(greedy[of.sequence] == 0)(lambda: _read_soft(of, row, flat, chunk, write))


def is_drafted(sequence: rows.Sequence, count: Any) -> jax.Array:
    """Whether the first `count` tokens were all drafted."""
    drafted = jnp.bool_(True)
    for i in range(sequence.num_draft):
        drafted = drafted & ((sequence.inputs.draft_tokens[sequence.number, i] >= 0) | (i >= count))
    return drafted


def look_up(sequence: rows.Sequence, row: Any, facts: Facts):
    """Writes the facts of one drafted token.

    Where a normalizer that was handed over cannot be used, its row is read here, by one block: that is rare.
    """
    inputs, index = sequence.inputs, (sequence.number, row)
    # All loads are issued before anything is written, and waited for once.
    token, accept = inputs.draft_tokens[index], inputs.uniforms.accept[index]
    normalizer = None if inputs.log_normalizers is None else inputs.log_normalizers[index]
    drafted = is_drafted(sequence, row + 1)
    target = rows.load_logit(sequence.target, row, token)
    draft = None if sequence.draft is None else rows.load_logit(sequence.draft, row, token)
    for ref, loaded in ((facts.target_logit, target), (facts.draft_logit, draft)):
        if loaded is not None:
            ref[index] = jnp.where(loaded[1], -jnp.inf, loaded[0])
    facts.token[index] = jnp.where(drafted, token, -1)
    facts.accept[index] = accept
    if normalizer is not None:
        assert sequence.draft is not None
        # A number, and small enough that subtracting it keeps q's precision.
        usable = (jnp.abs(normalizer) <= LARGEST_LOG_NORMALIZER) | ~drafted
        handed_over, draft_rows = (jnp.float32(0), normalizer), sequence.draft
        offset, log_sum = lax.cond(usable, lambda: handed_over, lambda: rows.row_log_sum(draft_rows, row))
        facts.q_offset[index], facts.q_log_sum[index] = offset, log_sum
