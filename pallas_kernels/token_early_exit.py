"""The token rule in one launch that stops reading a sequence at its first rejection, for batches that fill the GPU.

Launch `token_early_exit`, grid (sequence), one cluster of blocks per sequence. The blocks divide the look-ups of the
drafted tokens. Then, row after row: they divide the row's chunks of the target, and of the draft if `log_normalizers`
is None, and write maxima and sums to global memory; after a cluster barrier each block combines the chunks and accepts
or rejects the draft. After an accepted draft they continue with the next row, up to the bonus row. All blocks reach the
same decision. They divide the tiles of the row at which they stop, write their sums, and after a cluster barrier the
last block emits the token. Block 0 writes the accepted drafts.

Order: a row's statistics are written once, before the cluster barrier after which they are read. Tables in shared
memory are private to each block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import emit, last_token, reading, rows, scan, sync, token_rule
from pallas_kernels.random import Draws
from pallas_kernels.types import Filter, Verification


class Scratch(NamedTuple):
    """Global memory through which the blocks of a sequence communicate.

    Attributes:
      target: Statistics of the target's rows, one chunk per lane.
      draft: Likewise of the draft's; None if they are not read.
      facts: One value of each kind per drafted token; see `reading.Facts`.
    """

    target: reading.ChunkStats
    draft: reading.ChunkStats | None
    facts: reading.Facts


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

    `accept_prob` is 0 after the first rejection, where no row is read. `config` is chosen by
    `config.early_exit_config` if None; it has at most 16 blocks, the maximum of a cluster.
    """
    batch_size, num_rows, vocab_size = target_logits.shape
    num_draft = num_rows - 1
    inputs = rows.make_inputs(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, draft_tokens, draws
    )
    config = config or sizes.early_exit_config(batch_size, vocab_size)
    groups = sizes.groups(vocab_size, [ref.dtype for ref in inputs.logits], config)

    def token_early_exit(inputs, out, sums, read, tables, scratch, barrier):
        sequence = rows.sequence_view(inputs, vocab_size)

        def meet(is_last):
            sync.sync_cluster(barrier)
            return is_last

        emission = emit.make_emission(sequence, out, sums, scratch, groups, config.blocks, meet)
        row = _read_to_rejection(emission, read, tables)
        stop = token_rule.stop_at(sequence, tables, row)

        def write(row):
            # No rows are read after the first rejection.
            def if_read(accept_prob):
                return jnp.where(row <= stop.num_accepted, accept_prob, 0.0)

            token_rule.write_values(emission, tables, stop, row, if_read)

        last_token.emit_stop(emission, tables, stop, read.target, write)

    def stats(logits):
        return reading.stats_by_row(batch_size, num_rows, logits, vocab_size)

    draft = stats(inputs.draft.logits) if inputs.draft is not None and reading.reads_draft(inputs) else None
    read_type = Scratch(stats(inputs.target.logits), draft, reading.facts_types(batch_size, num_rows))
    out, _, _ = plgpu.kernel(
        token_early_exit,
        out_type=(*emit.output_types(batch_size, num_draft, groups.num_slots), read_type),
        scratch_types=(
            token_rule.tables_scratch(num_rows),
            scan.choose_scratch(),
            sync.cluster_scratch(),
        ),
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs)
    return emit.without_padding(out)


def _read_to_rejection(emission: emit.Emission, read: Scratch, tables: token_rule.Tables) -> jax.Array:
    """Reads rows and accepts drafts until the first rejection; returns the index of the last row read."""
    sequence = emission.sequence
    emit.share(emission, sequence.num_draft, lambda row: reading.look_up(sequence, row, read.facts))

    def read_draft(draft: rows.Rows, stats: reading.ChunkStats, row: Any):
        def read_chunk(chunk):
            reading.read_draft(draft, row, chunk, reading.write_to((stats, (sequence.number, row, chunk))))

        emit.share(emission, draft.num_chunks, read_chunk)

    def step(carry):
        row, _ = carry

        def read_target(chunk):
            write = reading.write_to((read.target, (sequence.number, row, chunk)))
            reading.read_target(sequence.target, row, chunk, write)

        emit.share(emission, sequence.target.num_chunks, read_target)
        if sequence.draft is not None and read.draft is not None:
            draft, stats, index = sequence.draft, read.draft, sequence.draft_row(row)
            drafted = (row < sequence.num_draft) & (sequence.inputs.draft_tokens[sequence.number, index] >= 0)
            pl.when(drafted)(lambda: read_draft(draft, stats, index))
        emission.meet_fn()
        values, accepted = _decide_row(sequence, read, row)
        token_rule.write_tables(tables, row, values)
        return row + 1, accepted

    # Each accepted draft needs the next row; the bonus row is never accepted, so the loop ends there.
    row, _ = lax.while_loop(lambda carry: carry[1], step, (jnp.int32(0), jnp.bool_(True)))
    return row - 1


def _decide_row(sequence: rows.Sequence, read: Scratch, row: Any) -> tuple[token_rule.Tables, jax.Array]:
    """The tables' values of a row that was just read, and whether its draft is accepted."""
    index = sequence.draft_row(row)
    facts = reading.Facts(*(ref[sequence.number, index] for ref in read.facts))
    facts = facts._replace(token=jnp.where(row < sequence.num_draft, facts.token, -1))

    def target_mass(is_greedy):
        return token_rule.row_mass(sequence.target, read.target, row, is_greedy)

    def draft_mass():
        if sequence.draft is None or read.draft is None:
            return token_rule.RowMass(facts.q_offset, facts.q_log_sum)
        return token_rule.row_mass(sequence.draft, read.draft, sequence.draft_row(row), None)

    return token_rule.decide(sequence, facts, target_mass, draft_mass, lambda flag: flag)
