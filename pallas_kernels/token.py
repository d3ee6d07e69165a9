"""The token rule in two launches, for batches that do not fill the GPU.

Launch `token_read`, grid (sequence, row, chunk): each block reads one chunk of one row of the target, or of the draft
if `log_normalizers` is None, and writes its maximum and its sum. One additional block per row looks up the logits of
the drafted token. No block waits for another.

Launch `token_emit`, grid (sequence, block): every block of a sequence combines the chunks' sums and accepts
drafts in all rows at once, one row per lane, so all blocks find the same emitting row. They divide the tiles of that
row, write their sums to global memory, and increment a counter; the last block to arrive sees all sums and emits the
token. Block 0 writes the accepted drafts.

Order: `token_emit` may start before `token_read` has ended, and waits for its end before it reads its outputs. Within
it, sums are ordered by the counter of `sync.arrive`, which `token_read` sets to zero.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import emit, last_token, reading, rows, scan, sync, tiles, token_rule
from pallas_kernels.random import ROUND_PARTS, Draws
from pallas_kernels.types import Filter, Verification


class Reading(NamedTuple):
    """The outputs of the first launch.

    Attributes:
      target: Statistics of the target's rows, one row per lane.
      draft: Likewise of the draft's; None if they are not read.
      target_by_row: The target's statistics with one chunk per lane, for the emitting row.
      facts: One value of each kind per drafted token; see `reading.Facts`.
      uniforms: The uniforms of the last token; see `reading.uniforms_type`. None without drafts.
      counters: Zeros, `[B]`, for `sync.arrive`.
      rejected: Whether the draft of each row was rejected, 0 or 1, `[B, lanes]`. None: the second launch decides.
      trials: Outputs for the block rule; None in other rules.
    """

    target: reading.ChunkStats
    draft: reading.ChunkStats | None
    target_by_row: reading.ChunkStats
    facts: reading.Facts
    uniforms: Any
    counters: Any
    rejected: Any = None
    trials: reading.Trials | None = None


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    log_normalizers: Float[Array, "B K"] | None,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
    *,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the token rule, on a Hopper or newer GPU.

    Accepts drafts while `log u < log p - log q`, u a uniform of each, then emits one token from max(p - q, 0), or from
    p after all drafts were accepted, by two-level inversion: one uniform picks a tile of `TILE` tokens, the other a
    token in it. The drafts of a sequence end at its first negative token; of the rows after them only the target's
    first is needed. With `log_normalizers` the draft's rows are not read, except those whose normalizer is NaN or
    beyond `LARGEST_LOG_NORMALIZER`.

    Logits are bfloat16, float16 or float32, with any V of at least `TILE`. Arithmetic is float32, with the hardware's
    exponentials, whose errors are about 2 units in the last place. `config` is chosen by `config.token_config` if None.
    """
    batch_size, _, vocab_size = target_logits.shape
    inputs = rows.make_inputs(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, draft_tokens, draws
    )
    config = config or sizes.token_config(batch_size, vocab_size)
    return read_then_emit(emit_after, inputs, target_logits.shape, config)


EmitFn = Callable[..., Verification]
"""The second launch of a rule, with the arguments of `emit_after`."""


def read_then_emit(
    emit_fn: EmitFn, inputs: rows.Inputs, shape: tuple[int, ...], config: sizes.Config, *, trial: bool = False
) -> Verification:
    """Launches `token_read`, then the second launch of a rule.

    `shape` is B, K + 1, V. `trial` asks the first launch for `Reading.trials`.
    """
    batch_size, num_rows, vocab_size = shape

    def view(inputs):
        return rows.sequence_view(inputs, vocab_size)

    trials = reading.trials_types(inputs, batch_size, num_rows, vocab_size, True) if trial else None
    read = read_rows(inputs, batch_size, num_rows, vocab_size, view, trials)

    def decide(inputs, read):
        sequence = view(inputs)
        return sequence, *decide_all(sequence, read, config.max_unrolled)

    out = emit_fn(read, inputs, decide, lambda read: read.target_by_row, batch_size, num_rows, vocab_size, config)
    return emit.without_padding(out)


def read_rows(
    inputs: rows.Inputs,
    batch_size: int,
    num_rows: int,
    vocab_size: int,
    view_fn: Callable[[rows.Inputs], rows.Sequence],
    trials: reading.Trials | None = None,
) -> Reading:
    """Launches `token_read`: one block per chunk of every drafted row, and one per drafted token for its `Facts`.

    `view_fn(inputs)` returns the sequence of a block. `trials` are the types of what the block rule needs too.
    """
    num_draft, reads_draft = num_rows - 1, reading.reads_draft(inputs)
    refs = inputs.logits if reads_draft else inputs.logits[:1]
    num_chunks = max(sizes.chunks(ref.dtype, vocab_size).count for ref in refs)
    num_slots = num_rows + (num_draft if reads_draft else 0)
    # If all blocks run concurrently, reading rows without a draft costs less than waiting for the draft tokens.
    reads_all = batch_size * num_slots * num_chunks <= sizes.READING_BLOCKS * sizes.num_multiprocessors()

    def token_read(inputs: rows.Inputs, out: Reading, *scratch: Any):
        sync.start_dependent_launch()
        sequence = view_fn(inputs)
        slot, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        if num_draft:
            # In separate blocks: a reading block would wait for these loads first.
            @pl.when((chunk == num_chunks) & (slot < num_draft))
            def _():
                reading.look_up(sequence, slot, out.facts)

            pl.when((chunk == num_chunks) & (slot == num_draft))(lambda: reading.write_uniforms(sequence, out.uniforms))
            pl.when((chunk > num_chunks) & (slot < ROUND_PARTS))(
                lambda: reading.write_rounds(sequence, slot, out.trials)
            )

        @pl.when((slot == 0) & (chunk == 0))
        def _():
            out.counters[sequence.number] = 0

        def read_target():
            by_chunk, by_row = (sequence.number, chunk, slot), (sequence.number, slot, chunk)
            write = reading.write_to((out.target, by_chunk), (out.target_by_row, by_row))
            tile_stats = None if out.trials is None else out.trials.tiles
            by_tile = None if tile_stats is None else reading.ByTile(tile_stats, *scratch)
            reading.read_target(sequence.target, slot, chunk, write, by_tile)

        def read():
            pl.when((slot <= num_draft) & (chunk < sequence.target.num_chunks))(read_target)
            if sequence.draft is not None and out.draft is not None:
                draft, stats, row = sequence.draft, out.draft, slot - num_draft - 1
                write = reading.write_to((stats, (sequence.number, chunk, row)))
                is_chunk = (slot > num_draft) & (chunk < draft.num_chunks)
                pl.when(is_chunk)(lambda: reading.read_draft(draft, row, chunk, write))

        if reads_all:
            read()
        else:
            count = jnp.where(slot <= num_draft, slot, slot - num_draft)
            pl.when(reading.is_drafted(sequence, count))(read)

    stats = functools.partial(reading.stats_by_chunk, batch_size, num_rows)
    out_type = Reading(
        target=stats(inputs.target.logits, vocab_size),
        draft=stats(inputs.draft.logits, vocab_size) if reads_draft and inputs.draft else None,
        target_by_row=reading.stats_by_row(batch_size, num_rows, inputs.target.logits, vocab_size),
        facts=reading.facts_types(batch_size, num_rows),
        uniforms=reading.uniforms_type(inputs, batch_size) if num_draft else None,
        counters=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        trials=trials,
    )
    (read,) = plgpu.kernel(
        token_read,
        out_type=(out_type,),
        scratch_types=(scan.sum_tiles_scratch(),) if trials and trials.tiles else (),
        grid=(batch_size, num_slots, num_chunks + (num_draft > 0) + (trials is not None)),
        grid_names=("sequence", "row", "chunk"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs)
    return read


def emit_after(
    read: Any,
    inputs: rows.Inputs,
    decide_fn: Callable[[rows.Inputs, Any], tuple[rows.Sequence, token_rule.Tables, jax.Array]],
    stats_fn: Callable[[Any], reading.ChunkStats | None],
    batch_size: int,
    num_rows: int,
    vocab_size: int,
    config: sizes.Config,
    write_fn: Callable[[emit.Emission, token_rule.Tables, token_rule.Stop, Any], None] = token_rule.write_values,
) -> Verification:
    """Launches `token_emit`: accepts drafts in all rows, and samples the token of the emitting row.

    Args:
      read: Outputs of the launch before; `read.counters` are zeros, `[B]`.
      inputs: The inputs.
      decide_fn: Returns this block's sequence, the tables' values of all rows, and which drafts are accepted.
      stats_fn: Returns statistics of the target, one chunk per lane, if `read` has them.
      batch_size: B.
      num_rows: K + 1.
      vocab_size: V.
      config: Blocks of a sequence.
      write_fn: `write_fn(emission, tables, stop, row)` writes the other outputs of each row, in one block. Without
        drafts, `accept_prob` has one column, which is not used otherwise.
    """
    num_draft = num_rows - 1
    groups = sizes.groups(vocab_size, [ref.dtype for ref in inputs.logits], config)

    def token_emit(inputs, read, out, sums, tables, scratch, number):
        def meet(is_last):
            del is_last
            return sync.arrive(sync.Arrivals(read.counters, number), sequence.number, config.blocks)

        sequence = rows.sequence_view(inputs, vocab_size)
        emission = emit.make_emission(sequence, out, sums, scratch, groups, config.blocks, meet)
        if config.prefetches:
            emit.prefetch_draft(emission, range(num_draft))
        sync.wait_for_previous_launch()
        sequence, values, accepted = decide_fn(inputs, read)
        uniforms = reading.load_uniforms(emission.uniforms, read, sequence)
        emission = emission._replace(sequence=sequence, uniforms=uniforms)
        token_rule.write_tables(tables, slice(None), values)
        lane = tiles.lane_index(sizes.row_lanes(num_rows))
        row = jnp.min(jnp.where(accepted, rows.MAX_INDEX, lane))
        stop = token_rule.stop_at(sequence, tables, row)

        write = functools.partial(write_fn, emission, tables, stop)
        last_token.emit_stop(emission, tables, stop, stats_fn(read), write)

    out, _ = plgpu.kernel(
        token_emit,
        out_type=emit.output_types(batch_size, num_draft, groups.num_slots),
        scratch_types=(
            token_rule.tables_scratch(num_rows),
            scan.choose_scratch(),
            sync.int32_scratch(),
        ),
        grid=(batch_size, config.blocks),
        grid_names=("sequence", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, read)
    return out


def decide_all(sequence: rows.Sequence, read: Reading, max_unrolled: int) -> tuple[token_rule.Tables, jax.Array]:
    """The tables' values of all rows of a sequence, one row per lane, and which drafts are accepted."""
    facts = load_facts(sequence, read.facts)

    def target_mass(is_greedy):
        return _mass(sequence.target, read.target, is_greedy, max_unrolled)

    def draft_mass():
        if sequence.draft is None or read.draft is None:
            return token_rule.RowMass(facts.q_offset, facts.q_log_sum)
        return _mass(sequence.draft, read.draft, None, max_unrolled)

    return token_rule.decide(sequence, facts, target_mass, draft_mass, functools.partial(per_row, sequence))


def load_facts(sequence: rows.Sequence, facts: reading.Facts) -> reading.Facts:
    """The facts of all drafted tokens of a sequence, one row per lane; the token of the other lanes is -1."""
    loaded = reading.Facts(*(tiles.load_lanes(ref, (sequence.number,)) for ref in facts))
    is_draft = tiles.lane_index(sizes.row_lanes(sequence.num_draft + 1)) < sequence.num_draft
    return loaded._replace(token=jnp.where(is_draft, loaded.token, -1))


def per_row(sequence: rows.Sequence, flag: Any) -> jax.Array:
    """A flag of the sequence, one row per lane."""
    # A comparison of lanes, because Mosaic does not broadcast a scalar boolean.
    return tiles.lane_index(sizes.row_lanes(sequence.num_draft + 1)) < jnp.where(flag, sizes.THREADS, 0)


def _mass(
    model: rows.Rows, stats: reading.ChunkStats, is_greedy: jax.Array | None, max_unrolled: int
) -> token_rule.RowMass:
    """The normalizers of all rows, from their chunks' statistics."""
    count, rate = model.num_chunks, rows.exp2_rate(rows.scale_of(model))
    unrolled = count <= max_unrolled

    def loader(ref):
        def load(chunk):
            return tiles.load_lanes(ref, (model.sequence, chunk))

        # Unrolled, all loads are issued before the first is needed.
        return [load(i) for i in range(count)].__getitem__ if unrolled else load

    def fold(fn, value_fn):
        if unrolled:
            return functools.reduce(fn, map(value_fn, range(count)))
        return lax.fori_loop(1, count, lambda i, joined: fn(joined, value_fn(i)), value_fn(0))

    tops, totals = loader(stats.top), loader(stats.total)
    top = fold(jnp.maximum, tops)
    log_sum = jnp.log(fold(jnp.add, lambda i: totals(i) * jnp.exp2((tops(i) - top) * rate)))
    if is_greedy is None:
        return token_rule.RowMass(top, log_sum)
    firsts = loader(stats.first)
    first = fold(jnp.minimum, lambda i: jnp.where(tops(i) == top, firsts(i), rows.MAX_INDEX))
    return token_rule.greedy_mass(top, log_sum, first, is_greedy)
