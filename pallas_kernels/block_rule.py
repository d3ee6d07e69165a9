"""The decisions of the block rule inside its kernels: the rows at which a sequence may stop, and the one where it does.

A row is named by the number of drafts before it: row i emits the token after i drafts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, last_token, rows, tiles, token_rule
from pallas_kernels.types import BOUND_SLACK


class Joint(NamedTuple):
    """One value per row in shared memory.

    Attributes:
      log_ratio: log p - log q of the draft after i drafts, `[lanes]`.
      log_prob: log P_i, `[lanes]`.
      uniform: The uniform that decides on row i + 1, `[lanes]`.
      summed: 1 if the tiles of the row are summed, else 0, `[lanes]`; see `write_summed`.
    """

    log_ratio: Any
    log_prob: Any
    uniform: Any
    summed: Any


def joint_scratch(num_rows: int) -> Joint:
    """Shared memory for `Joint`."""
    shape = (config.row_lanes(num_rows),)
    floats = plgpu.SMEM(shape, jnp.float32)
    return Joint(floats, floats, floats, plgpu.SMEM(shape, jnp.int32))


class Search(NamedTuple):
    """Rows at which a sequence may stop.

    Attributes:
      possible: The row if the sequence may stop at it, else -1, one row per lane.
      end: The number of usable drafts.
      first: The largest possible row.
      sure: The largest possible row with P = 1, at which the sequence stops if it stops at none after it.
    """

    possible: jax.Array
    end: jax.Array
    first: jax.Array
    sure: jax.Array


def uniform_of(joint: Joint, row: Any) -> jax.Array:
    """The uniform that decides on a row; row 0, on which none decides, has another row's."""
    return joint.uniform[jnp.maximum(row - 1, 0)]


def find_rows(sequence: rows.Sequence, values: token_rule.Tables, uniforms: jax.Array, joint: Joint) -> Search:
    """Finds the possible rows, and writes `joint` but `joint.summed`.

    `values` and `uniforms` have one row per lane; uniform i decides on row i + 1.
    """
    num_rows, size = sequence.num_draft + 1, config.row_lanes(sequence.num_draft + 1)
    lane = tiles.lane_index(size)
    trusted = values.log_q > -jnp.inf
    # Registers -> shared memory: [lanes].
    joint.log_ratio[...] = jnp.where(trusted, values.log_p - values.log_q, -jnp.inf)
    joint.uniform[...] = uniforms

    def step(row, carry):
        log_prob, log_probs, u = carry
        at_row = lane == row
        log_probs = jnp.where(at_row, log_prob, log_probs)
        # A scalar per row: matrix instructions, which move so short a vector, need addresses that are multiples of 16.
        u = jnp.where(at_row, uniform_of(joint, row), u)
        return jnp.minimum(log_prob + joint.log_ratio[row], 0.0), log_probs, u

    zeros = plgpu.layout_cast(jnp.zeros((size,)), tiles.lane_layout(size))
    carry = jnp.float32(0), zeros, zeros
    if num_rows <= config.MIN_LANES:
        # Unrolled, all loads are issued before the first is needed.
        for row in range(num_rows):
            carry = step(row, carry)
    else:
        carry = lax.fori_loop(0, num_rows, step, carry)
    _, log_prob, u = carry
    joint.log_prob[...] = log_prob
    prob = jnp.exp(log_prob)
    usable = trusted & token_rule.are_regular(sequence, values.p_offset, values.p_log_sum, values.p_certain)
    # The bonus row has no usable draft.
    end = jnp.min(jnp.where(usable, rows.MAX_INDEX, lane))
    # Z = P - (the sum of min(P p, q)), of which the drafted token is one term.
    most = prob - jnp.exp(jnp.minimum(log_prob + values.log_p, values.log_q)) + BOUND_SLACK
    kept = jnp.where(usable, u * (most + 1 - prob), u) < jnp.where(usable, most, prob)
    possible = jnp.where((lane <= end) & (kept | (lane == 0)), lane, -1)
    first, sure = jnp.max(possible), jnp.max(jnp.where(prob >= 1, possible, 0))
    return Search(possible, end, first, sure)


def write_summed(joint: Joint, search: Search, tries: jax.Array, other: jax.Array) -> jax.Array:
    """Writes `joint.summed`: of the possible rows from `sure` to `first` if `tries`, and of row `other`.

    Returns the same flags in registers.
    """
    lane = tiles.lane_index(joint.summed.shape[0])
    # Comparisons of lanes, because Mosaic does not broadcast a scalar boolean.
    tried = (search.possible >= jnp.where(tries, search.sure, rows.MAX_INDEX)) & (lane <= search.first)
    flags = jnp.where(tried | (lane == other), 1, 0)
    # Registers -> shared memory: [lanes].
    joint.summed[...] = flags
    return flags


def last_row(joint: Joint, search: Search, total_fn: Callable[[Any], jax.Array]) -> jax.Array:
    """The row at which the sequence stops; `total_fn(row)` is the sum of a row's weights."""

    def before(row):
        return jnp.max(jnp.where(search.possible < row, search.possible, 0))

    def step(carry):
        row, _ = carry

        def accept():
            total, rest = total_fn(row), 1 - jnp.exp(joint.log_prob[row])
            # u < Z / (Z + 1 - P) without the division.
            return uniform_of(joint, row) * (total + rest) < total

        # P is 1 at `sure`.
        accepted = lax.cond(row <= search.sure, lambda: jnp.bool_(True), accept)
        return jnp.where(accepted, row, before(row)), accepted

    decided = search.first == search.end
    return lax.while_loop(lambda carry: ~carry[1], step, (search.first, decided))[0]


def stop_at(
    sequence: rows.Sequence, tables: token_rule.Tables, joint: Joint, search: Search, row: Any
) -> token_rule.Stop:
    """The `Stop` of a row: its weights are max(P p - q, 0), or p after all usable drafts."""
    rejecting = row < search.end
    log_joint = jnp.where(rejecting, joint.log_prob[row], 0.0)
    return token_rule.stop_at(sequence, tables, row)._replace(rejecting=rejecting, log_joint=log_joint)


def certain_total(sequence: rows.Sequence, stop: token_rule.Stop) -> jax.Array:
    """The sum of the weights of a greedy row: max(P - q, 0) at the token of probability 1."""
    assert stop.log_joint is not None
    return jnp.maximum(jnp.exp(stop.log_joint) - jnp.exp(last_token.log_q_of_certain(sequence, stop)), 0.0)
