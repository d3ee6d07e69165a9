"""The rounds of the block rule in a kernel: draws tokens of p, tests them, and emits what was found."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import block_rule, config, emit, last_token, reading, rows, scan, sync, tiles, token_rule
from pallas_kernels.config import THREADS, WARP
from pallas_kernels.types import ROUNDS, TILE

TOKEN_BITS = 24
"""Bits of the token in the number that names a success; the round is above them."""


COIN, FOR_TILE, FOR_TOKEN = range(3)
"""The uniforms of a round, in the order of `Uniforms.rounds`."""


class Drawn(NamedTuple):
    """Shared memory for the rounds that a block tries at the same time.

    Attributes:
      tiles: The logits of each round's tile, -inf outside of it, `[rounds, TILE]`.
      token: The first token of each round's loaded tile, then the token that was drawn, or -1; `[MIN_LANES]`, of which
        the first are used.
    """

    tiles: Any
    token: Any


def drawn_scratch(dtype: Any, count: int) -> Drawn:
    """Shared memory for `Drawn` of `count` rounds."""
    return Drawn(plgpu.SMEM((count, TILE), dtype), plgpu.SMEM((config.MIN_LANES,), jnp.int32))


class Trial(NamedTuple):
    """State of one block that tries rounds of a sequence.

    Attributes:
      emission: The emission.
      tables: Values per row.
      joint: Values per row and round.
      search: The state of the search.
      drawn: Shared memory of `try_rounds`; None in a launch that does not call it.
      rounds: The uniforms of the rounds of all sequences.
      barrier: Scratch of the cluster barrier, or None likewise.
      tile_stats: Sums of tiles from the first launch. None: they are in `emission.sums`, one row per target row.
    """

    emission: emit.Emission
    tables: token_rule.Tables
    joint: block_rule.Joint
    search: block_rule.Search
    drawn: Any
    rounds: Any
    barrier: Any
    tile_stats: reading.TileStats | None

    def stop_at(self, row: Any) -> token_rule.Stop:
        """The `Stop` of a row."""
        return block_rule.stop_at(self.emission.sequence, self.tables, self.joint, self.search.end, row)

    def at(self, row: Any) -> emit.Emission:
        """The emission with the sums of tiles of this row."""
        return self.emission._replace(sums_row=rows.flat_row(self.emission.sequence.target, row))

    def write(self, stop: token_rule.Stop):
        """Writes the outputs but the last token."""
        write = functools.partial(token_rule.write_values, self.emission, self.tables, stop)
        last_token.write_accepted(self.emission, self.tables, stop, write)


def most_rounds(num_slots: int) -> int:
    """The largest power of two of rounds that a block can try at once: their weights of tiles fit `choose_each`."""
    most = max(1, min(scan.MAX_CHOICES, scan.MAX_LOADS * THREADS // config.to_lanes(num_slots)))
    return 1 << (most.bit_length() - 1)


def try_rounds(trial: Trial, found: Any, number: Any) -> jax.Array:
    """Tries rounds in passes, some in each block of the cluster, until one succeeds.

    Args:
      trial: The state.
      found: The least success of each sequence and pass, `[B * MAX_PASSES]`: round and token as one number, or
        `rows.MAX_INDEX`.
      number: Scratch from `sync.int32_scratch`.

    Returns:
      The success, `rows.MAX_INDEX` if there is none; all blocks return the same.
    """
    emission = trial.emission
    count = trial.drawn.tiles.shape[0]
    at_once = count * emission.num_blocks
    if ROUNDS % at_once or ROUNDS // at_once > reading.MAX_PASSES:
        raise ValueError(
            f"rounds of all blocks must divide {ROUNDS} into at most {reading.MAX_PASSES} passes; got {at_once}"
        )

    def step(state):
        i, _ = state
        success = _try_together(trial, i * at_once + emission.block * count, count)
        # A number of its own for each pass: a block may begin the next one before another has read this.
        slot = emission.sequence.number * reading.MAX_PASSES + i
        return i + 1, sync.least_of_cluster(found, slot, success, number, trial.barrier, emission.num_blocks)

    def goes_on(state):
        return (state[0] < ROUNDS // at_once) & (state[1] == rows.MAX_INDEX)

    return lax.while_loop(goes_on, step, (jnp.int32(0), jnp.int32(rows.MAX_INDEX)))[1]


def _try_together(trial: Trial, first: Any, count: int) -> jax.Array:
    """Tries `count` rounds; returns the first success."""
    emission = trial.emission
    target = emission.sequence.target
    rounds = [first + i for i in range(count)]
    planned = [trial.joint.row[each // WARP, each % WARP] for each in rounds]
    rows_of = [jnp.maximum(row, 0) for row in planned]
    weights = [_tile_weights(trial, row) for row in rows_of]
    uniforms = [_uniform(trial, FOR_TILE, each) for each in rounds]
    chosen = scan.choose_each(emission.scratch, weights, uniforms, tiles.lane_layout(weights[0].shape[0]))
    before = 0 if trial.tile_stats is not None else emission.groups.before
    read = [
        rows.load_tiles([(target, row)], choice.number - before) for row, choice in zip(rows_of, chosen, strict=True)
    ]
    for i, (tile, logits) in enumerate(read):
        # Registers -> shared memory: [TILE], and an index.
        tiles.store(trial.drawn.tiles.at[i], tiles.mask_tile(logits[0], tile, -jnp.inf))
        trial.drawn.token[i] = tile.first * tile.vec
    layout = read[0][0].layout

    def choose_token(i):
        row = jnp.maximum(trial.joint.row[(first + i) // WARP, (first + i) % WARP], 0)
        # Shared memory -> registers: [TILE].
        logits = plgpu.load(trial.drawn.tiles.at[i], layout=layout, optimized=False)
        probs = rows.prob(target, row, logits, trial.tables.p_offset[row], trial.tables.p_log_sum[row])
        number = scan.choose(emission.scratch, probs, _uniform(trial, FOR_TOKEN, first + i), layout).number
        token = jnp.minimum(trial.drawn.token[i] + number, target.vocab_size - 1)
        trial.drawn.token[i] = jnp.where(number < 0, -1, token)

    # A loop, because all tiles at once take the registers of other blocks.
    emit.for_each(count, choose_token)
    successes = [_success(trial, each, trial.drawn.token[i]) for i, each in enumerate(rounds)]
    return functools.reduce(jnp.minimum, successes)


def _success(trial: Trial, number: Any, token: jax.Array) -> jax.Array:
    """The number of a round and its token if it succeeds, else `rows.MAX_INDEX`; the token is -1 without a weight."""
    sequence, planned = trial.emission.sequence, trial.joint.row[number // WARP, number % WARP]
    stop, drawn = trial.stop_at(jnp.maximum(planned, 0)), jnp.maximum(token, 0)
    x, _ = rows.load_logit(sequence.target, stop.num_accepted, drawn)
    log_ratio = last_token.log_q_of(sequence, stop, drawn)
    log_ratio -= rows.log_prob(sequence.target, x, stop.p_offset, stop.p_log_sum)
    assert stop.log_joint is not None
    below = _uniform(trial, COIN, number) < jnp.exp(stop.log_joint) - jnp.exp(log_ratio)
    succeeds = (planned >= 0) & (token >= 0) & below
    return jnp.where(succeeds, (number << TOKEN_BITS) | drawn, rows.MAX_INDEX)


def _uniform(trial: Trial, kind: int, number: Any) -> jax.Array:
    """A uniform of a round: its coin, that of its tile, or that of its token."""
    index = kind * ROUNDS + number
    return trial.rounds[trial.emission.sequence.number, index // THREADS, index % THREADS]


def _tile_weights(trial: Trial, row: Any) -> jax.Array:
    """Weights of the tiles of p in a row, one tile per lane."""
    emission, stats = trial.emission, trial.tile_stats
    target = emission.sequence.target
    if stats is None:
        return tiles.load_first_lanes(emission.sums, (rows.flat_row(target, row),), emission.groups.num_slots, 0.0)
    count, index = config.num_tiles(target.vocab_size), (target.sequence, row)
    tops = tiles.load_first_lanes(stats.top, index, count, -jnp.inf)
    weights = tiles.load_first_lanes(stats.total, index, count, 0.0)
    weights = weights * jnp.exp2((tops - trial.tables.p_offset[row]) * rows.exp2_rate(rows.scale_of(target)))
    return jnp.where(weights > scan.LEAST_WEIGHT, weights, 0.0)


def emit_found(trial: Trial, found: jax.Array):
    """Emits the token of a successful round."""
    number = found >> TOKEN_BITS
    stop = trial.stop_at(trial.joint.row[number // WARP, number % WARP])
    trial.write(stop)
    last_token.write_sampled(trial.emission, stop, found & ((1 << TOKEN_BITS) - 1), jnp.bool_(False))


def emit_rest(trial: Trial, stats: reading.ChunkStats | None):
    """Emits the token after all usable drafts, or that of the row which the exact search finds; in all blocks."""
    sequence, search = trial.emission.sequence, trial.search
    greedy = sequence.target.filter.greedy

    def total(row):
        stop = trial.stop_at(row)

        def of_tiles():
            last_token.sum_row(trial.at(row), stop, stats)
            sync.sync_cluster(trial.barrier)
            return emit.sum_tiles(trial.at(row))

        if greedy is None:
            return of_tiles()
        return lax.cond(stop.p_certain < 0, of_tiles, lambda: block_rule.certain_total(sequence, stop))

    last = jnp.where(search.decided, search.end, block_rule.last_row(trial.joint, search, total))
    stop = trial.stop_at(last)

    @pl.when(trial.emission.block == 0)
    def _():
        trial.write(stop)
        last_token.emit_from_sums(trial.at(last), stop, stats)
