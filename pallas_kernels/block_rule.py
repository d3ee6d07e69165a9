"""The decisions of the block rule inside its kernels: joint probabilities, the row of each round, the exact search.

A row is named by the number of drafts before it: row i emits the token after i drafts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, last_token, rows, scan, tiles, token_rule
from pallas_kernels.config import WARP
from pallas_kernels.types import ROUNDS

VECTORS = ROUNDS // WARP
"""Vectors of the length of a warp that hold one value per round."""


class Joint(NamedTuple):
    """Values per row, `[lanes]`, and per round, in shared memory.

    Attributes:
      log_ratio: log p - log q of the draft after i drafts.
      log_prob: log P_i.
      uniform: The uniform that decides on row i + 1.
      tried: 1 if some round draws a token of the row, else 0.
      row: The row of which a round draws a token, or -1, `[VECTORS, WARP]`.
    """

    log_ratio: Any
    log_prob: Any
    uniform: Any
    tried: Any
    row: Any


def joint_scratch(num_rows: int) -> Joint:
    """Shared memory for `Joint`."""
    shape = (config.row_lanes(num_rows),)
    floats, ints = plgpu.SMEM(shape, jnp.float32), plgpu.SMEM(shape, jnp.int32)
    return Joint(floats, floats, floats, ints, plgpu.SMEM((VECTORS, WARP), jnp.int32))


class Search(NamedTuple):
    """The state of a sequence's search for the row at which it stops.

    Attributes:
      end: The number of usable drafts.
      decided: Whether the sequence keeps all of them.
      tries: Whether rounds look for its row.
      rest: The row that remains when no round succeeds.
    """

    end: jax.Array
    decided: jax.Array
    tries: jax.Array
    rest: jax.Array


def begin(
    sequence: rows.Sequence, values: token_rule.Tables, uniforms: jax.Array, coins: list[jax.Array], joint: Joint
) -> Search:
    """Finds the state before the first draw, and writes `joint`.

    `values` and `uniforms` have one row per lane; uniform i decides on row i + 1. `coins` have one round per lane.
    """
    num_rows, size = sequence.num_draft + 1, config.row_lanes(sequence.num_draft + 1)
    lane = tiles.lane_index(size)
    trusted = values.log_q > -jnp.inf
    # Registers -> shared memory: [lanes].
    joint.log_ratio[...] = jnp.where(trusted, values.log_p - values.log_q, -jnp.inf)
    joint.uniform[...] = uniforms
    joint.tried[...] = jnp.where(lane < 0, lane, 0)

    def step(row, carry):
        log_prob, log_probs = carry
        log_probs = jnp.where(lane == row, log_prob, log_probs)
        return jnp.minimum(log_prob + joint.log_ratio[row], 0.0), log_probs

    zeros = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), tiles.lane_layout(size))
    _, log_prob = _for_rows(num_rows, step, (jnp.float32(0), zeros))
    joint.log_prob[...] = log_prob
    usable = trusted & token_rule.are_regular(sequence, values.p_offset, values.p_log_sum, values.p_certain)
    # The bonus row has no usable draft.
    end = jnp.min(jnp.where(usable, rows.MAX_INDEX, lane))
    decided = (end == 0) | (joint.uniform[jnp.maximum(end - 1, 0)] < jnp.exp(joint.log_prob[end]))
    greedy = sequence.target.filter.greedy
    tries = ~decided if greedy is None else ~decided & (greedy[sequence.number] == 0)
    rest = lax.cond(tries, lambda: _plan(num_rows - 1, joint, coins, end), lambda: jnp.maximum(end - 1, 0))
    return Search(end, decided, tries, rest)


def _for_rows(count: int, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Folds `step` over the numbers below `count`."""
    if count > config.MIN_LANES:
        return lax.fori_loop(0, count, step, carry)
    # Unrolled, all loads are issued before the first is needed.
    for i in range(count):
        carry = step(i, carry)
    return carry


def _plan(num_draft: int, joint: Joint, coins: list[jax.Array], end: jax.Array) -> jax.Array:
    """Writes `joint.row` and `joint.tried`; returns the row that remains after all rounds.

    A round whose coin is not below P steps back by a row, so the coins alone tell the row of each round.
    """
    number = [tiles.lane_index(WARP) + i * WARP for i in range(VECTORS)]

    def step(i, carry):
        start, rest, *planned = carry
        row = jnp.maximum(end - 1 - i, 0)
        prob = jnp.exp(joint.log_prob[row])
        rest = jnp.where(start <= ROUNDS, row, rest)
        # P is 1 at row 0: no coin steps back from there.
        steps_back = [jnp.where((n >= start) & (c >= prob), n, ROUNDS) for n, c in zip(number, coins, strict=True)]
        first = scan.warp_min(functools.reduce(jnp.minimum, steps_back))
        planned = [
            jnp.where((n >= start) & (n < first), row, rows_of) for n, rows_of in zip(number, planned, strict=True)
        ]

        @pl.when((i < end) & (start < first))
        def _():
            joint.tried[row] = jnp.int32(1)

        return first + 1, rest, *planned

    carry = jnp.int32(0), jnp.int32(0), *(jnp.where(n < 0, n, -1) for n in number)
    _, rest, *planned = _for_rows(num_draft, step, carry)
    for i, rows_of in enumerate(planned):
        # Registers -> shared memory: [WARP].
        joint.row[i] = rows_of
    return rest


def last_row(joint: Joint, search: Search, total_fn: Callable[[Any], jax.Array]) -> jax.Array:
    """The row at which an undecided sequence stops; `total_fn(row)` is the sum of a row's weights."""

    def step(carry):
        row, _ = carry
        total, rest = total_fn(row), 1 - jnp.exp(joint.log_prob[row])
        # u < Z / (Z + 1 - P) without the division.
        # Where P is 1, as at row 0, the sequence stops.
        below = joint.uniform[jnp.maximum(row - 1, 0)] * (total + rest) < total
        accepted = below | (joint.log_prob[row] >= 0)
        return jnp.where(accepted, row, row - 1), accepted

    return lax.while_loop(lambda carry: ~carry[1], step, (search.rest, search.decided))[0]


def stop_at(
    sequence: rows.Sequence, tables: token_rule.Tables, joint: Joint, end: jax.Array, row: Any
) -> token_rule.Stop:
    """The `Stop` of a row: its weights are max(P p - q, 0), or p after all usable drafts."""
    rejecting = row < end
    log_joint = jnp.where(rejecting, joint.log_prob[row], 0.0)
    return token_rule.stop_at(sequence, tables, row)._replace(rejecting=rejecting, log_joint=log_joint)


def certain_total(sequence: rows.Sequence, stop: token_rule.Stop) -> jax.Array:
    """The sum of the weights of a greedy row: max(P - q, 0) at the token of probability 1."""
    assert stop.log_joint is not None
    log_q = last_token.log_q_of(sequence, stop, stop.p_certain)
    return jnp.maximum(jnp.exp(stop.log_joint) - jnp.exp(log_q), 0.0)
