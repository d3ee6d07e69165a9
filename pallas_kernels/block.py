"""The block rule in two launches: that of the token rule which reads the rows, then one that tries rows to stop at.

A sequence of n usable drafts stops after i of them, for the largest i with `u_i < h_i` (`specsamp_jax.rules.block`).
`h_i` needs `Z_{i+1}`, the sum over a whole row of max(P_i p - q, 0), but only few rows can be that i: an upper bound of
`Z_{i+1}` is known from the drafted token alone. They are tried from the right, and the sums of the row that is found
then choose the token.

Launch `block_emit_tokens`, grid (sequence, part, block): the blocks sum the tiles of all rows that may be tried, and
increment the sequence's counter; the last block to arrive tries the rows and emits the token. In small batches every
row has blocks of its own (a part per row). In large ones the blocks of a sequence sum one row after the other, without
a barrier between them; blocks of sequences without such a row end at once, so that others take their place.

Order: as in `token`. The sums of a row are written once, before the counter is incremented.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    block_rule,
    emit,
    last_token,
    reading,
    rows,
    scan,
    sync,
    tiles,
    token,
    token_filtered,
    token_rule,
)
from pallas_kernels import config as sizes
from pallas_kernels.limits import Limits
from pallas_kernels.random import Draws
from pallas_kernels.types import Filter, Verification


def verify_block(
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
    """Returns the verification by the block rule (Sun et al., 2024, arXiv 2403.10444), with K of at least 1.

    Arguments are those of `token.verify_token`; `config` is chosen by `config.block_config` if None.
    """
    config = config or sizes.block_config(*target_logits.shape)
    inputs = rows.make_inputs(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, draft_tokens, draws
    )
    return token.read_then_emit(emit_tokens, inputs, target_logits.shape, config)


def verify_filtered_block(
    target_logits: Float[Array, "B K1 V"],
    target_limits: Limits,
    draft_logits: Float[Array, "B K V"] | None,
    draft_limits: Limits,
    log_normalizers: Float[Array, "B K"] | None,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
    *,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the block rule like `verify_block`, but finds the cutoffs of the filters too.

    Arguments are those of `token_filtered.verify_token`.
    """
    config = config or sizes.filtered_block_config(*target_logits.shape)
    models = target_logits, target_limits, draft_logits, draft_limits
    return token_filtered.filter_then_emit(emit_tokens, *models, log_normalizers, draft_tokens, draws, config)


class _Scratch(NamedTuple):
    """Shared memory of a block. `choice` serves `scan.choose`, `meeting` the synchronisation of the blocks."""

    tables: token_rule.Tables
    joint: block_rule.Joint
    choice: Any
    meeting: Any


def _scratch(num_rows: int, meeting: Any) -> tuple[_Scratch]:
    """Types of the shared memory."""
    tables, joint = token_rule.tables_scratch(num_rows), block_rule.joint_scratch(num_rows)
    return (_Scratch(tables, joint, scan.choose_scratch(), meeting),)


class _Trial(NamedTuple):
    """State of one block that tries rows of a sequence: its emission, its tables, and the rows that are possible."""

    emission: emit.Emission
    tables: token_rule.Tables
    joint: block_rule.Joint
    search: block_rule.Search
    stats: Any

    def stop_at(self, row: Any) -> token_rule.Stop:
        return block_rule.stop_at(self.emission.sequence, self.tables, self.joint, self.search, row)

    def at(self, row: Any) -> emit.Emission:
        """The emission with the sums of tiles of this row."""
        sequence = self.emission.sequence
        return self.emission._replace(sums_row=rows.flat_row(sequence.target, row))

    def total(self, row: Any) -> jax.Array:
        """The sum of the weights of a row whose tiles have been summed."""
        emission, stop = self.at(row), self.stop_at(row)

        def of_tiles():
            return emit.sum_tiles(emission)

        def of_certain():
            return block_rule.certain_total(emission.sequence, stop)

        if emission.sequence.target.filter.greedy is None:
            return of_tiles()
        return lax.cond(stop.p_certain < 0, of_tiles, of_certain)

    def last_row(self) -> jax.Array:
        """The number of drafts after which the sequence stops."""
        return block_rule.last_row(self.joint, self.search, self.total)

    def write(self, stop: token_rule.Stop):
        """Writes the outputs but the last token."""
        write = functools.partial(token_rule.write_values, self.emission, self.tables, stop)
        last_token.write_accepted(self.emission, self.tables, stop, write)


def _begin(emission: emit.Emission, inputs, read, scratch: _Scratch, decide_fn, stats_fn) -> _Trial:
    """Waits for the first launch, and finds the possible rows."""
    sync.wait_for_previous_launch()
    sequence, values, _ = decide_fn(inputs, read)
    uniforms = reading.load_uniforms(emission.uniforms, read, sequence)
    accept = tiles.load_lanes(read.facts.accept, (sequence.number,))
    search = block_rule.find_rows(sequence, values, accept, scratch.joint)
    token_rule.write_tables(scratch.tables, slice(None), values)
    emission = emission._replace(sequence=sequence, uniforms=uniforms)
    return _Trial(emission, scratch.tables, scratch.joint, search, stats_fn(read))


def emit_tokens(read, inputs, decide_fn, stats_fn, batch_size, num_rows, vocab_size, config) -> Verification:
    """Launches `block_emit_tokens`. The arguments are those of `token.emit_after`."""
    groups = sizes.groups(vocab_size, [ref.dtype for ref in inputs.logits], config)
    apart = config.row_parts > 1

    def block_emit_tokens(inputs, read, out, sums, scratch):
        def meet(is_last):
            # Not called: `sum_and_meet` synchronises the blocks.
            return is_last

        sequence = rows.sequence_view(inputs, vocab_size)
        emission = emit.make_emission(sequence, out, sums, scratch.choice, groups, config.blocks, meet)
        part = lax.axis_index("part")
        if config.prefetches:
            # In small batches `part` is the row that these blocks sum.
            pl.when(part < num_rows - 1)(lambda: emit.prefetch_draft(emission, [part]))
        trial = _begin(emission, inputs, read, scratch, decide_fn, stats_fn)
        emission, search = trial.emission, trial.search
        end_needs_sums = last_token.needs_tile_sums(emission, trial.stop_at(search.end), trial.stats)
        greedy = emission.sequence.target.filter.greedy
        decided = search.first == search.end
        tries = ~decided if greedy is None else ~decided & (greedy[emission.sequence.number] == 0)
        end = jnp.where(decided & end_needs_sums, search.end, -1)
        flags = block_rule.write_summed(trial.joint, search, tries, end)
        summed = trial.joint.summed
        # Parts that sum at least one row, and whether this one does.
        num_parts, sums_rows = (jnp.sum(flags), summed[part] > 0) if apart else (jnp.max(flags), jnp.max(flags) > 0)

        def sum_and_meet():
            def sum_row(row):
                pl.when(summed[row] > 0)(lambda: last_token.sum_row(trial.at(row), trial.stop_at(row), trial.stats))

            if apart:
                sum_row(part)
            else:
                emit.for_each(num_rows, sum_row)
            arrivals = sync.Arrivals(read.counters, scratch.meeting)
            return sync.arrive(arrivals, emission.sequence.number, num_parts * config.blocks)

        def is_first():
            return (num_parts == 0) & (part == 0) & (emission.block == 0)

        @pl.when(lax.cond(sums_rows, sum_and_meet, is_first))
        def _():
            last = trial.last_row()
            stop = trial.stop_at(last)
            trial.write(stop)
            last_token.emit_from_sums(trial.at(last), stop, trial.stats)

    out, _ = plgpu.kernel(
        block_emit_tokens,
        out_type=emit.output_types(batch_size, num_rows - 1, groups.num_slots, num_rows),
        scratch_types=_scratch(num_rows, sync.int32_scratch()),
        grid=(batch_size, config.row_parts, config.blocks),
        grid_names=("sequence", "part", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, read)
    return out
