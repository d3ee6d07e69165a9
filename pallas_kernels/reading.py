"""Reads rows before acceptance: a maximum and a sum per chunk, and the logits of the drafted tokens."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import config, random, rows, scan, tiles
from pallas_kernels.types import LARGEST_LOG_NORMALIZER, TILE

MAX_PASSES = 8
"""Maximum passes in which the blocks of a sequence try all rounds."""


class ChunkStats(NamedTuple):
    """Statistics of chunks of rows in global memory, in one of two layouts.

    `[B, chunks, lanes]`, one row per lane (`config.row_lanes`), serves acceptance of all rows at once.
    `[B, rows, lanes]`, one chunk per lane, serves acceptance of a single row.

    Attributes:
      top: Largest logit.
      total: Sum of kept exp((logit - top) * scale); unset in greedy rows.
      first: First index of the largest logit; set in greedy rows only.
    """

    top: Any
    total: Any
    first: Any


class TileStats(NamedTuple):
    """Sums of the tiles of the target's rows in global memory, `[B, rows, lanes]` with one tile per lane.

    The last row of the last sequence may be wrong, because its last loads do not begin at a tile.

    Attributes:
      top: Largest logit of the chunk that the tile belongs to.
      total: Sum of kept exp((logit - top) * scale); unset in greedy rows.
    """

    top: Any
    total: Any


class Facts(NamedTuple):
    """One value per drafted token, each `[B, lanes]` in global memory with one row per lane.

    Attributes:
      token: The drafted token; -1 from the first position without a draft.
      target_logit: Its logit in the target's row, -inf if outside the vocabulary or filtered out.
      draft_logit: Its logit in the draft's row, likewise.
      accept: The uniform that decides on it.
      q_offset, q_log_sum: The normalizer of the draft's row; unset without `log_normalizers`.
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
    """Types of `ChunkStats` `[B, chunks, lanes]`, with one row per lane."""
    num_chunks = config.chunks(logits.dtype, vocab_size).count
    return _stats_types((batch_size, num_chunks, config.row_lanes(num_rows)))


def stats_by_row(batch_size: int, num_rows: int, logits: jax.Array, vocab_size: int) -> ChunkStats:
    """Types of `ChunkStats` `[B, rows, lanes]`, with one chunk per lane."""
    num_chunks = config.chunks(logits.dtype, vocab_size).count
    return _stats_types((batch_size, num_rows, config.to_lanes(num_chunks)))


def tile_stats(batch_size: int, num_rows: int, vocab_size: int) -> TileStats:
    """Types of `TileStats`."""
    shape = batch_size, num_rows, config.to_lanes(config.num_tiles(vocab_size))
    return TileStats(*(jax.ShapeDtypeStruct(shape, jnp.float32),) * 2)


def load_row_stats(model: rows.Rows, stats: ChunkStats, row: Any) -> tuple[jax.Array, jax.Array]:
    """Maxima and sums of the chunks of one row, one chunk per lane; -inf and 0 after the last chunk."""
    index = model.sequence, row
    tops = tiles.load_first_lanes(stats.top, index, model.num_chunks, -jnp.inf)
    return tops, tiles.load_first_lanes(stats.total, index, model.num_chunks, 0.0)


def facts_types(batch_size: int, num_rows: int) -> Facts:
    """Types of `Facts`."""
    shape = batch_size, config.row_lanes(num_rows)
    return Facts(jax.ShapeDtypeStruct(shape, jnp.int32), *(jax.ShapeDtypeStruct(shape, jnp.float32),) * 5)


def uniforms_type(inputs: rows.Inputs, batch_size: int) -> Any:
    """Type of the uniforms of the last tokens, `[B, 2]`; None if they are inputs.

    The first launch computes them while it reads the rows, which hides the microsecond that this takes. In the second
    launch either every block would compute them, or the emitting block would compute them last.
    """
    if not isinstance(inputs.draws, random.Noise):
        return None
    return jax.ShapeDtypeStruct((batch_size, random.EMIT_DRAWS), jnp.float32)


def write_uniforms(sequence: rows.Sequence, ref: Any):
    """Computes and writes the uniforms of a sequence's last token, unless they are inputs."""
    if ref is not None:
        for i, value in enumerate(random.emit_uniforms(sequence.inputs.draws, sequence.number)):
            ref[sequence.number, i] = value


def load_uniforms(computed: list[jax.Array], read: Any, sequence: rows.Sequence) -> list[jax.Array]:
    """The uniforms of a sequence's last token from `read.uniforms`, the first launch; `computed` without them."""
    if read.uniforms is None:
        return computed
    return [read.uniforms[sequence.number, i] for i in range(random.EMIT_DRAWS)]


class Trials(NamedTuple):
    """Outputs of the first launch that only the block rule needs.

    Attributes:
      rounds: The uniforms of the rounds, `[B, ROUND_PARTS, THREADS]`. None if they are inputs.
      found: Initially the largest int32, `[B * MAX_PASSES]`: `block_emit_tokens` lowers it to the first successful
        round of each pass and its token, as one number.
      tiles: Sums of the tiles of the target's rows; None if the launch reads no chunks or they are not whole tiles.
    """

    rounds: Any
    found: Any
    tiles: TileStats | None


def trials_types(inputs: rows.Inputs, batch_size: int, num_rows: int, vocab_size: int, has_chunks: bool) -> Trials:
    """Types of `Trials`; `has_chunks` if the launch reads the rows in chunks."""
    from_keys = isinstance(inputs.draws, random.Noise)
    shape = batch_size, random.ROUND_PARTS, config.THREADS
    by_tiles = has_chunks and config.chunks(inputs.target.logits.dtype, vocab_size).tiles is not None
    return Trials(
        rounds=jax.ShapeDtypeStruct(shape, jnp.float32) if from_keys else None,
        found=jax.ShapeDtypeStruct((batch_size * MAX_PASSES,), jnp.int32),
        tiles=tile_stats(batch_size, num_rows, vocab_size) if by_tiles else None,
    )


def write_rounds(sequence: rows.Sequence, part: Any, trials: Trials | None):
    """Writes the uniforms of one part of a sequence's rounds, unless they are inputs, and begins `Trials.found`."""
    if trials is None:
        return
    for i in range(MAX_PASSES):
        trials.found[sequence.number * MAX_PASSES + i] = jnp.int32(rows.MAX_INDEX)
    if trials.rounds is not None and isinstance(sequence.inputs.draws, random.Noise):
        index = tiles.lane_index(config.THREADS) + part * config.THREADS
        # Registers -> L2: [THREADS].
        tiles.store(
            trials.rounds.at[sequence.number, part],
            random.round_uniforms(sequence.inputs.draws, sequence.number, index),
        )


def reads_draft(inputs: rows.Inputs) -> bool:
    """Whether the draft's rows must be read, because it has logits but no `log_normalizers`."""
    return inputs.draft is not None and inputs.log_normalizers is None


Write = Callable[[Callable[[ChunkStats], Any], Any], None]
"""Function that stores one statistic of a chunk: `write(lambda stats: stats.top, value)`."""


def write_to(*destinations: tuple[ChunkStats, tuple[Any, ...]]) -> Write:
    """Returns a `Write` that stores to each of `destinations`, pairs of statistics and an index."""

    def write(field, value):
        for stats, index in destinations:
            field(stats)[index] = value

    return write


class ByTile(NamedTuple):
    """Statistics of tiles to write, and scratch from `scan.sum_tiles_scratch`."""

    stats: TileStats
    scratch: Any


def read_draft(model: rows.Rows, row: Any, chunk: Any, write: Write):
    """Reads a chunk of a draft row, and writes its maximum and its sum."""
    _read_soft(model, row, rows.flat_row(model, row), chunk, write)


def _read_soft(model: rows.Rows, row: Any, flat: Any, chunk: Any, write: Write, by_tile: ByTile | None = None):
    def sum_by_tile(weights, top):
        assert by_tile is not None
        cut = config.chunks(model.logits.dtype, model.vocab_size)
        per_tile = TILE // cut.lanes
        summed = [functools.reduce(jnp.add, weights[i : i + per_tile]) for i in range(0, len(weights), per_tile)]
        index = model.sequence, row, pl.ds(chunk * cut.tiles, len(summed))
        refs = by_tile.stats.total.at[index], by_tile.stats.top.at[index]
        return scan.sum_tiles(by_tile.scratch, summed, top, *refs, tiles.chunk_layout(cut))

    top, total = rows.chunk_log_sum(model, row, flat, chunk, None if by_tile is None else sum_by_tile)
    write(lambda stats: stats.top, top)
    write(lambda stats: stats.total, total)


def read_target(model: rows.Rows, row: Any, chunk: Any, write: Write, by_tile: ByTile | None = None):
    """Reads a chunk of a target row, and writes its maximum and its sum, or the first largest logit of a greedy row.

    With `by_tile` it also writes the sums of the chunk's tiles.
    """
    # Computed once, before the branches.
    flat = rows.flat_row(model, row)

    def read_greedy():
        top, first = rows.chunk_first_largest(model, flat, chunk)
        write(lambda stats: stats.top, top)
        write(lambda stats: stats.first, first)

    def read_soft():
        _read_soft(model, row, flat, chunk, write, by_tile)

    greedy = model.filter.greedy
    if greedy is None:
        read_soft()
    else:
        pl.when(greedy[model.sequence] > 0)(read_greedy)
        pl.when(greedy[model.sequence] == 0)(read_soft)


def is_drafted(sequence: rows.Sequence, count: Any) -> jax.Array:
    """Whether each of the first `count` positions has a drafted token."""
    drafted = jnp.bool_(True)
    for i in range(sequence.num_draft):
        drafted = drafted & ((sequence.inputs.draft_tokens[sequence.number, i] >= 0) | (i >= count))
    return drafted


def look_up(sequence: rows.Sequence, row: Any, facts: Facts):
    """Writes the `Facts` of one drafted token.

    If its normalizer in `log_normalizers` is NaN or too large, this block alone reads the draft's row: a rare case.
    """
    inputs, index = sequence.inputs, (sequence.number, row)
    # All loads are issued before the first store, so that their latencies overlap.
    token, accept = inputs.draft_tokens[index], random.accept_uniform(inputs.draws, *index)
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
        draft_rows = sequence.draft

        def write(offset, log_sum):
            facts.q_offset[index], facts.q_log_sum[index] = offset, log_sum

        # Each branch writes: under `shard_map` their results would be of different types, varying and not.
        pl.when(usable)(lambda: write(jnp.float32(0), normalizer))
        pl.when(~usable)(lambda: write(*rows.row_log_sum(draft_rows, row)))
