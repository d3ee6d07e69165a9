"""The token rule in three launches that skip rows after a rejection, for batches that fill the GPU.

Launch `token_look_up`, grid (sequence, row): one block per drafted token looks up its `Facts`. One more per sequence
writes the uniforms of its last token and zeros its counters. Its stop, the last row that may be needed, is at first the
number of its drafts.

Launch `token_read_in_turn`, grid (row, sequence, block): first the first rows of all sequences, then the second ones. A
block whose row is after the sequence's stop does nothing. Others read `config.chunks` chunks, write their maxima and
sums, and, of rows with a draft, increment the row's counter. The last block of a row accepts or rejects its draft, and
after a rejection lowers the stop to this row. No block waits for another: at worst it reads rows that were not needed,
because the draft of an earlier row is rejected later.

Launch `token_emit`, as in `token`; values of rows after the stop are computed from what was there, and not used.

Order: the first launch waits for nothing, and so starts after all work before it has ended. The others may start early.
Every block of the second waits for the end of the first before it uses its outputs (blocks of first rows after they
have read their chunks), and the third waits for the end of the second, so it sees the outputs of both. The decision on
a row sees the row's statistics by its counter. A block that misses a lower stop reads more than it needs to.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import emit, reading, rows, sync, tiles, token, token_rule
from pallas_kernels.random import Draws
from pallas_kernels.types import Filter, Verification


class LookUps(NamedTuple):
    """The outputs of the first launch.

    Attributes:
      facts: One value of each kind per drafted token; see `reading.Facts`.
      uniforms: The uniforms of the last token; see `reading.uniforms_type`.
      stops: The last row of each sequence that may be needed, `[B]`; lowered by the second launch.
      num_read: Zeros, `[B * K]`: the second launch counts the blocks that have read each row.
      counters: Zeros, `[B]`, for `sync.arrive` in the last launch.
    """

    facts: reading.Facts
    uniforms: Any
    stops: Any
    num_read: Any
    counters: Any


class Statistics(NamedTuple):
    """The outputs of the second launch. Those of rows after a rejection or after the last draft may be unset.

    Attributes:
      target, draft: Statistics of the rows, one row per lane; `draft` is None if its rows are not read.
      target_by_row, draft_by_row: Likewise, one chunk per lane.
      rejected: Whether the draft of each row was rejected, 0 or 1, `[B, lanes]`.
    """

    target: reading.ChunkStats
    draft: reading.ChunkStats | None
    target_by_row: reading.ChunkStats
    draft_by_row: reading.ChunkStats | None
    rejected: Any


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
    """Returns the verification by the token rule, as `token.verify_token` does; K is at least 1.

    `accept_prob` is 0 after the first rejection, where rows may not have been read. `config` is chosen by
    `config.early_exit_config` if None.
    """
    batch_size, num_rows, vocab_size = target_logits.shape
    inputs = rows.make_inputs(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, draft_tokens, draws
    )
    config = config or sizes.early_exit_config(batch_size, vocab_size, reading.reads_draft(inputs))
    found = _look_up(inputs, batch_size, num_rows, vocab_size)
    stats = _read_in_turn(inputs, found, batch_size, num_rows, vocab_size, config.chunks)

    def decide(inputs, read):
        sequence = rows.sequence_view(inputs, vocab_size)
        values, _ = token.decide_all(sequence, read, config.max_unrolled)
        # Not decided again: sums of chunks in another order may round differently.
        rejected = tiles.load_lanes(read.rejected, (sequence.number,))
        return sequence, values, (rejected == 0) & (values.token >= 0)

    def write(emission, tables, stop, row):
        def if_read(accept_prob):
            return jnp.where(row <= stop.num_accepted, accept_prob, 0.0)

        token_rule.write_values(emission, tables, stop, row, if_read)

    read = token.Reading(
        target=stats.target,
        draft=stats.draft,
        target_by_row=stats.target_by_row,
        facts=found.facts,
        uniforms=found.uniforms,
        counters=found.counters,
        rejected=stats.rejected,
    )
    shape = batch_size, num_rows, vocab_size
    out = token.emit_after(read, inputs, decide, lambda read: read.target_by_row, *shape, config, write)
    return emit.without_padding(out)


def _look_up(inputs: rows.Inputs, batch_size: int, num_rows: int, vocab_size: int) -> LookUps:
    """Launches `token_look_up`."""
    num_draft = num_rows - 1

    def token_look_up(inputs: rows.Inputs, out: LookUps):
        sync.start_dependent_launch()
        sequence, row = rows.sequence_view(inputs, vocab_size), lax.axis_index("row")
        pl.when(row < num_draft)(lambda: reading.look_up(sequence, row, out.facts))

        @pl.when(row == num_draft)
        def _():
            drafted, stop = jnp.bool_(True), jnp.int32(0)
            for i in range(num_draft):
                drafted = drafted & (sequence.inputs.draft_tokens[sequence.number, i] >= 0)
                stop = stop + drafted.astype(jnp.int32)
                out.num_read[_count_index(sequence, i)] = 0
            out.stops[sequence.number] = stop
            out.counters[sequence.number] = 0
            reading.write_uniforms(sequence, out.uniforms)

    integers = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    out_type = LookUps(
        facts=reading.facts_types(batch_size, num_rows),
        uniforms=reading.uniforms_type(inputs, batch_size),
        stops=integers,
        num_read=jax.ShapeDtypeStruct((batch_size * num_draft,), jnp.int32),
        counters=integers,
    )
    (out,) = plgpu.kernel(
        token_look_up,
        out_type=(out_type,),
        grid=(batch_size, num_rows),
        grid_names=("sequence", "row"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs)
    return out


def _read_in_turn(
    inputs: rows.Inputs, found: LookUps, batch_size: int, num_rows: int, vocab_size: int, per_block: int
) -> Statistics:
    """Launches `token_read_in_turn`, with `per_block` chunks per block."""
    num_draft = num_rows - 1
    target = inputs.target.logits
    draft = inputs.draft.logits if inputs.draft is not None and reading.reads_draft(inputs) else None
    num_chunks, num_draft_chunks = (
        0 if each is None else sizes.chunks(each.dtype, vocab_size).count for each in (target, draft)
    )
    num_all = num_chunks + num_draft_chunks
    num_blocks = -(-num_all // per_block)

    def token_read_in_turn(inputs: rows.Inputs, found: LookUps, out: Statistics, number):
        sync.start_dependent_launch()
        sequence = rows.sequence_view(inputs, vocab_size)
        row, block = lax.axis_index("row"), lax.axis_index("block")

        def read_target(chunk):
            by_chunk, by_row = (sequence.number, chunk, row), (sequence.number, row, chunk)
            reading.read_target(
                sequence.target, row, chunk, reading.write_to((out.target, by_chunk), (out.target_by_row, by_row))
            )

        def read_chunk(chunk):
            if sequence.draft is None or out.draft is None or out.draft_by_row is None:
                read_target(chunk)
                return
            draft, draft_chunk = sequence.draft, chunk - num_chunks
            by_chunk, by_row = (sequence.number, draft_chunk, row), (sequence.number, row, draft_chunk)
            write = reading.write_to((out.draft, by_chunk), (out.draft_by_row, by_row))
            pl.when(draft_chunk < 0)(lambda: read_target(chunk))
            pl.when((draft_chunk >= 0) & (row < num_draft))(lambda: reading.read_draft(draft, row, draft_chunk, write))

        def read():
            # Unrolled, which is faster than a loop.
            for i in range(per_block):
                chunk = block * per_block + i
                if num_all % per_block == 0:
                    read_chunk(chunk)
                else:
                    pl.when(chunk < num_all)(functools.partial(read_chunk, chunk))

        def is_needed():
            sync.wait_for_previous_launch()
            return sync.load_latest(found.stops, sequence.number, number) >= row

        def is_last():
            sync.wait_for_previous_launch()
            arrivals = sync.Arrivals(found.num_read, number)
            return sync.arrive(arrivals, _count_index(sequence, row), num_blocks)

        def decide():
            accepted = _is_accepted(sequence, out, found.facts, row)
            out.rejected[sequence.number, row] = (~accepted).astype(jnp.int32)
            pl.when(~accepted)(lambda: sync.lower(found.stops, sequence.number, row))

        @pl.when(lax.cond(row > 0, is_needed, lambda: jnp.bool_(True)))
        def _():
            read()
            # No row depends on the one after all drafts.
            pl.when(lax.cond(row < num_draft, is_last, lambda: jnp.bool_(False)))(decide)

    def stats(logits):
        shape = batch_size, num_rows, logits, vocab_size
        return reading.stats_by_chunk(*shape), reading.stats_by_row(*shape)

    by_chunk, by_row = stats(target)
    draft_by_chunk, draft_by_row = (None, None) if draft is None else stats(draft)
    (out,) = plgpu.kernel(
        token_read_in_turn,
        out_type=(
            Statistics(
                target=by_chunk,
                draft=draft_by_chunk,
                target_by_row=by_row,
                draft_by_row=draft_by_row,
                rejected=jax.ShapeDtypeStruct((batch_size, sizes.row_lanes(num_rows)), jnp.int32),
            ),
        ),
        scratch_types=(sync.int32_scratch(),),
        grid=(num_rows, batch_size, num_blocks),
        grid_names=("row", "sequence", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, found)
    return out


def _count_index(sequence: rows.Sequence, row: Any) -> Any:
    """Index of a drafted row in `LookUps.num_read`."""
    return sequence.number * sequence.num_draft + row


def _is_accepted(sequence: rows.Sequence, stats: Statistics, facts: reading.Facts, row: Any) -> jax.Array:
    """Whether the draft of a row that has been read is accepted."""
    facts = reading.Facts(*(ref[sequence.number, row] for ref in facts))

    def target_mass(is_greedy):
        return token_rule.row_mass(sequence.target, stats.target_by_row, row, is_greedy)

    def draft_mass():
        if sequence.draft is None or stats.draft_by_row is None:
            return token_rule.RowMass(facts.q_offset, facts.q_log_sum)
        return token_rule.row_mass(sequence.draft, stats.draft_by_row, row, None)

    return token_rule.decide(sequence, facts, target_mass, draft_mass, lambda flag: flag)[1]
