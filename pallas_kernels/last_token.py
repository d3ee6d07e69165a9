"""Emission of a sequence's last token from the row at which it stops, shared by the token rule and the block rule."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import config, emit, reading, rows, scan, tiles
from pallas_kernels.token_rule import Stop, Tables, residual_weights, stop_weights, target_weights


def emit_stop(
    emission: emit.Emission,
    tables: Tables,
    stop: Stop,
    target_stats: reading.ChunkStats | None,
    write_fn: Callable[[Any], None],
):
    """Emits the last token of a sequence and writes its outputs.

    `target_stats` are statistics of the target, one chunk per lane, or None. `write_fn(row)` writes the other outputs.
    """
    needs_sums = needs_tile_sums(emission, stop, target_stats)

    def sum_and_meet():
        sum_row(emission, stop, target_stats)
        return emission.meet_fn()

    emits = lax.cond(needs_sums, sum_and_meet, lambda: emission.block == emission.num_blocks - 1)
    pl.when(emission.block == 0)(lambda: write_accepted(emission, tables, stop, write_fn))
    pl.when(emits)(lambda: emit_from_sums(emission, stop, target_stats))


def needs_tile_sums(emission: emit.Emission, stop: Stop, target_stats: reading.ChunkStats | None) -> jax.Array:
    """Whether the sums of the row's tiles must be computed before its token is sampled.

    Not for a token of p if chunks are whole tiles: the sums of its chunks, from the first launch, suffice.
    """
    sampled = _is_sampled(stop)
    return sampled if _chunk_tiles(emission, target_stats) is None else sampled & stop.rejecting


def sum_row(emission: emit.Emission, stop: Stop, target_stats: reading.ChunkStats | None):
    """Writes this block's share of the sums of tiles of a row for which `needs_tile_sums` is True."""
    sequence = emission.sequence

    def sum_groups(sources, weights_fn):
        def sum_group(group):
            emit.sum_group(emission, sources, lambda *loaded: weights_fn(sequence, stop, *loaded), group)

        emit.share(emission, emit.groups_of(emission, sources), sum_group)

    def sum_residual():
        sum_groups(emit.all_sources(emission, stop.num_accepted), residual_weights)

    if _chunk_tiles(emission, target_stats) is not None:
        sum_residual()
        return
    if sequence.num_draft:
        pl.when(stop.rejecting)(sum_residual)
    target = emit.target_source(emission, stop.num_accepted)
    pl.when(~stop.rejecting)(lambda: sum_groups(target, target_weights))


def write_accepted(emission: emit.Emission, tables: Tables, stop: Stop, write_fn: Callable[[Any], None]):
    """Writes the accepted drafts, the padding, and the other outputs by `write_fn(row)`."""
    emit.write_drafts(emission, stop.num_accepted, lambda row: tables.token[row], write_fn)


def emit_from_sums(emission: emit.Emission, stop: Stop, target_stats: reading.ChunkStats | None):
    """Emits the token in one block, after the sums of tiles have been written if they are needed."""
    sampled, chunk_tiles = _is_sampled(stop), _chunk_tiles(emission, target_stats)
    needs_sums = needs_tile_sums(emission, stop, target_stats)
    pl.when(sampled)(lambda: _emit_sampled(emission, stop, needs_sums, target_stats, chunk_tiles))
    pl.when(~sampled)(lambda: _emit_certain(emission, stop))


def _is_sampled(stop: Stop) -> jax.Array:
    return ~stop.degenerate & (stop.p_certain < 0)


def _chunk_tiles(emission: emit.Emission, target_stats: reading.ChunkStats | None) -> int | None:
    """Tiles per chunk; None if there are no statistics of chunks or these are not whole tiles."""
    target = emission.sequence.target
    return target_stats and config.chunks(target.logits.dtype, target.vocab_size).tiles


def _emit_sampled(emission, stop, needs_sums, target_stats, chunk_tiles):
    """Samples the token from the weights of the row, or from p if they are all zero."""
    sequence = emission.sequence
    zeros = jnp.int32(0), jnp.float32(0)
    number, total = lax.cond(needs_sums, lambda: emit.choose_tile(emission), lambda: zeros)
    # The total is 0 if no sums were computed, or if the residual of a rejected draft is empty.
    from_target = total == 0

    def choose_target_tile():
        if chunk_tiles is not None:
            return _choose_tile_by_chunks(emission, stop, target_stats, chunk_tiles)
        target = emit.target_source(emission, stop.num_accepted)

        def sum_group(group):
            emit.sum_group(emission, target, lambda *loaded: target_weights(sequence, stop, *loaded), group)

        emit.sum_alone(emission, sum_group)
        return emit.choose_tile(emission)[0]

    number = lax.cond(from_target, choose_target_tile, lambda: number)
    empty = stop.rejecting & from_target
    drawn = stop._replace(rejecting=stop.rejecting & ~from_target)
    sources = emit.all_sources(emission, stop.num_accepted)
    token = emit.choose_token(emission, sources, lambda *loaded: stop_weights(sequence, drawn, *loaded), number)
    write_sampled(emission, stop, token, empty)


def write_sampled(emission: emit.Emission, stop: Stop, token: jax.Array, empty: jax.Array):
    """Writes a token that was sampled, its log-probability and the status; `empty` if the residual was."""
    x, _ = rows.load_logit(emission.sequence.target, stop.num_accepted, token)
    _write_last(emission, stop, token, rows.log_prob(emission.sequence.target, x, stop.p_offset, stop.p_log_sum), empty)


def _choose_tile_by_chunks(emission, stop, stats, chunk_tiles):
    """Chooses a tile of p by the first uniform: first a chunk by its sum in `stats`, then one of its tiles."""
    tops, totals = reading.load_row_stats(target := emission.sequence.target, stats, stop.num_accepted)
    weights = totals * jnp.exp2((tops - stop.p_offset) * rows.exp2_rate(rows.scale_of(target)))
    weights = jnp.where(weights > scan.LEAST_WEIGHT, weights, 0.0)
    chunk, total = scan.choose(emission.scratch, weights, emission.uniforms[0], tiles.lane_layout(weights.shape[0]))
    if chunk_tiles == 1:  # Mosaic finds no layout for the scalars of a single sum.
        return chunk
    # Divided by the row's sum, as the weights of tiles are.
    before = jnp.sum(jnp.where(tiles.lane_index(weights.shape[0]) < chunk, weights, 0.0))
    rest = (emission.uniforms[0] * total - before) * jnp.exp2(stop.p_log_sum * -rows.LOG2_E)
    first = chunk * chunk_tiles
    read = [rows.load_tiles([(target, stop.num_accepted)], first + i) for i in range(chunk_tiles)]
    weighed = [tiles.mask_tile(target_weights(emission.sequence, stop, logits, tile), tile) for tile, logits in read]
    sums = scan.sum_vectors(weighed, vec := read[0][0].vec)
    return first + scan.first_scalar_beyond(scan.to_scalars(sums, vec), rest)


def _emit_certain(emission, stop):
    """Emits the token of probability 1 of a greedy row, or the first largest logit of a degenerate row."""
    sequence, row = emission.sequence, stop.num_accepted
    first = lax.cond(stop.degenerate, lambda: rows.first_largest_number(sequence.target, row), lambda: jnp.int32(0))
    # The residual is empty if the draft has all its probability on the same token.
    left = log_q_of(sequence, stop, stop.p_certain) < 0 if sequence.num_draft else jnp.bool_(True)
    log_prob = jnp.where(stop.degenerate, -jnp.inf, 0.0)
    token = jnp.where(stop.degenerate, first, stop.p_certain)
    _write_last(emission, stop, token, log_prob, stop.rejecting & ~stop.degenerate & ~left)


def log_q_of(sequence: rows.Sequence, stop: Stop, token: jax.Array) -> jax.Array:
    """Logarithm of q of a token in the draft's row."""
    log_q = jnp.where(stop.q_certain == token, 0.0, -jnp.inf)
    if sequence.draft is None:
        return log_q
    x, outside = rows.load_logit(sequence.draft, sequence.draft_row(stop.num_accepted), token)
    soft = rows.log_prob(sequence.draft, x, stop.q_offset, stop.q_log_sum)
    return jnp.where(stop.q_certain < 0, jnp.where(outside, -jnp.inf, soft), log_q)


def _write_last(emission, stop, token, log_prob, empty):
    emit.write_last(emission, stop.num_accepted, token, stop.degenerate, stop.distrusted, empty)
    emission.outputs.log_probs[emission.sequence.number, stop.num_accepted] = log_prob
