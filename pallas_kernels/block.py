"""The block rule in two launches or three: that of the token rule which reads the rows, then one that draws tokens.

A sequence of n usable drafts keeps all of them if `u_n < P_n`. Else its row and its token are found in rounds
(`specsamp_jax.rules.rounds`): a coin steps back by a row, or lets a token be drawn from p and tested. The coins alone
tell the row of each round, so many rounds are tried at the same time; the first success counts. In the rare case that
none succeeds, the blocks go on by the sums of whole rows.

Launch `block_sum_rows`, grid (sequence, part, block), runs between the two if the first leaves no sums of the tiles of
p: for rows whose cutoffs were searched, or if chunks are not whole tiles. Each block writes its share of the sums of
the rows that rounds draw from.

Launch `block_emit_tokens`, grid (sequence), one cluster of blocks per sequence: in each pass every block tries a few
rounds and lowers `Trials.found` to its first success. After the cluster barrier all blocks know the first success of
all, and block 0 emits its token.

Order: a launch may start before the previous one has ended, and waits for its end before it reads its outputs. The
cluster barrier orders the atomic minimum, and the sums of rows after the last round.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import (
    block_rule,
    block_trial,
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
from pallas_kernels.random import Draws, Noise
from pallas_kernels.types import ROUNDS, Filter, Verification


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

    Arguments are those of `token.verify_token`; uniforms have `ROUNDS` rounds. `config` is chosen by
    `config.block_config` if None.
    """
    config = config or sizes.block_config(target_logits.shape[0])
    if not isinstance(draws, Noise) and draws.rounds is None:
        raise NotImplementedError(f"the block rule's kernel needs uniforms of {ROUNDS} rounds; got none")
    inputs = rows.make_inputs(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, draft_tokens, draws
    )
    return token.read_then_emit(emit_tokens, inputs, target_logits.shape, config, trial=True)


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
    config = config or sizes.block_config(target_logits.shape[0])
    models = target_logits, target_limits, draft_logits, draft_limits
    return token_filtered.filter_then_emit(
        emit_tokens, *models, log_normalizers, draft_tokens, draws, config, trial=True
    )


class _Scratch(NamedTuple):
    """Shared memory of a block. `choice` serves `scan.choose`, the last two the synchronisation of blocks."""

    tables: token_rule.Tables
    joint: block_rule.Joint
    choice: Any
    drawn: block_trial.Drawn | None
    number: Any
    barrier: Any


def _scratch(num_rows: int, drawn: block_trial.Drawn | None = None, barrier: Any = None) -> tuple[_Scratch]:
    """Types of the shared memory."""
    tables, joint = token_rule.tables_scratch(num_rows), block_rule.joint_scratch(num_rows)
    return (_Scratch(tables, joint, scan.choose_scratch(), drawn, sync.int32_scratch(), barrier),)


def _begin(emission: emit.Emission, inputs, read, scratch: _Scratch, decide_fn) -> block_trial.Trial:
    """Waits for the launch before, and finds the rows of the rounds."""
    sync.wait_for_previous_launch()
    sequence, values, _ = decide_fn(inputs, read)
    uniforms = reading.load_uniforms(emission.uniforms, read, sequence)
    accept = tiles.load_lanes(read.facts.accept, (sequence.number,))
    rounds = sequence.inputs.draws.rounds if read.trials.rounds is None else read.trials.rounds
    coins = [tiles.load_warp(rounds, (sequence.number, 0), i) for i in range(block_rule.VECTORS)]
    token_rule.write_tables(scratch.tables, slice(None), values)
    search = block_rule.begin(sequence, values, accept, coins, scratch.joint)
    emission = emission._replace(sequence=sequence, uniforms=uniforms)
    return block_trial.Trial(
        emission, scratch.tables, scratch.joint, search, scratch.drawn, rounds, scratch.barrier, read.trials.tiles
    )


def emit_tokens(read, inputs, decide_fn, stats_fn, batch_size, num_rows, vocab_size, config) -> Verification:
    """Launches `block_emit_tokens`, after `block_sum_rows` if needed. The arguments are those of `token.emit_after`."""
    dtypes = [ref.dtype for ref in inputs.logits]
    groups, sums = sizes.groups(vocab_size, dtypes, config), None
    if read.trials.tiles is None:
        shape = batch_size, num_rows, vocab_size
        summing = sizes.block_sum_config(*shape)
        groups = sizes.groups(vocab_size, dtypes, summing)
        sums = _sum_rows(read, inputs, decide_fn, stats_fn, shape, groups, summing)

    count = min(config.rounds, block_trial.most_rounds(groups.num_slots))

    def block_emit_tokens(inputs, read, summed, out, own_sums, scratch):
        sequence = rows.sequence_view(inputs, vocab_size)
        # The search by sums overwrites rows of `summed`: this launch is the only one that reads it.
        sums = own_sums if summed is None else summed
        emission = emit.make_emission(sequence, out, sums, scratch.choice, groups, config.blocks, _never_meet)
        trial = _begin(emission, inputs, read, scratch, decide_fn)
        stats = stats_fn(read)

        def try_rounds():
            return block_trial.try_rounds(trial, read.trials.found, scratch.number)

        found = lax.cond(trial.search.tries, try_rounds, lambda: jnp.int32(rows.MAX_INDEX))
        pl.when((found < rows.MAX_INDEX) & (emission.block == 0))(lambda: block_trial.emit_found(trial, found))
        pl.when(found == rows.MAX_INDEX)(lambda: block_trial.emit_rest(trial, stats))

    out, _ = plgpu.kernel(
        block_emit_tokens,
        out_type=emit.output_types(batch_size, num_rows - 1, groups.num_slots, num_rows if sums is None else 1),
        scratch_types=_scratch(num_rows, block_trial.drawn_scratch(dtypes[0], count), sync.cluster_scratch()),
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, read, sums)
    return out


def _never_meet(is_last: jax.Array) -> jax.Array:
    """The `meet_fn` of `emit.make_emission`, which nothing calls here: the blocks meet at the cluster barrier."""
    return is_last


def _sum_rows(read, inputs, decide_fn, stats_fn, shape, groups, config) -> jax.Array:
    """Launches `block_sum_rows`: sums the tiles of p in the rows of rounds, and in the row after all usable drafts.

    In small batches each row has blocks of its own, which sum it without asking whether a round is at it.
    """
    batch_size, num_rows, vocab_size = shape
    apart = config.row_parts > 1

    def block_sum_rows(inputs, read, sums, scratch):
        sync.start_dependent_launch()
        sequence = rows.sequence_view(inputs, vocab_size)
        emission = emit.make_emission(sequence, None, sums, scratch.choice, groups, config.blocks, _never_meet)
        if apart:
            sync.wait_for_previous_launch()
            sequence, values, _ = decide_fn(inputs, read)
            token_rule.write_tables(scratch.tables, slice(None), values)
            _sum_row(emission._replace(sequence=sequence), scratch.tables, lax.axis_index("part"))
            return
        trial = _begin(emission, inputs, read, scratch, decide_fn)
        emission, search = trial.emission, trial.search
        last = search.decided & last_token.needs_tile_sums(emission, trial.stop_at(search.end), stats_fn(read))

        def sum_row(row):
            needed = (trial.joint.tried[row] > 0) | (last & (row == search.end))
            pl.when(needed)(lambda: _sum_row(emission, trial.tables, row))

        emit.for_each(num_rows, sum_row)

    (sums,) = plgpu.kernel(
        block_sum_rows,
        out_type=(jax.ShapeDtypeStruct((batch_size * num_rows, sizes.to_lanes(groups.num_slots)), jnp.float32),),
        scratch_types=_scratch(num_rows),
        grid=(batch_size, config.row_parts, config.blocks),
        grid_names=("sequence", "part", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, read)
    return sums


def _sum_row(emission: emit.Emission, tables: token_rule.Tables, row: Any):
    """Writes this block's share of the sums of the tiles of p in a row."""
    target, source = emission.sequence.target, emit.target_source(emission, row)
    emission = emission._replace(sums_row=rows.flat_row(target, row))

    def weights(logits, tile):
        del tile
        return rows.prob(target, row, logits[0], tables.p_offset[row], tables.p_log_sum[row])

    count = emit.groups_of(emission, source)
    emit.share(emission, count, lambda group: emit.sum_group(emission, source, weights, group))
