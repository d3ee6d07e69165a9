"""The decisions of the block rule inside its kernels: the rows at which a sequence may stop, and the one where it does.

A row is named by the number of drafts before it: row i emits the token after i drafts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, last_token, rows, token_rule
from pallas_kernels.types import BOUND_SLACK


class Joint(NamedTuple):
    """One value per row in shared memory, each `[lanes]`.

    Attributes:
      log_prob: log P_i.
      uniform: `uniform[i]` decides on row i + 1.
      possible: 1 if the sequence may stop at the row, else 0.
    """

    log_prob: Any
    uniform: Any
    possible: Any


def joint_scratch(num_rows: int) -> Joint:
    """Shared memory for `Joint`."""
    shape = (config.row_lanes(num_rows),)
    floats = plgpu.SMEM(shape, jnp.float32)
    return Joint(floats, floats, plgpu.SMEM(shape, jnp.int32))


class Search(NamedTuple):
    """Rows at which a sequence may stop.

    Attributes:
      end: The number of usable drafts.
      first: The largest possible row.
      sure: The largest possible row with P = 1, at which the sequence stops if it stops at none after it.
    """

    end: jax.Array
    first: jax.Array
    sure: jax.Array


def find_rows(sequence: rows.Sequence, tables: token_rule.Tables, joint: Joint) -> Search:
    """Finds the possible rows, and writes log P and `possible` of each to `joint`."""

    def step(row, carry):
        log_prob, going, search = carry
        prob = jnp.exp(log_prob)
        log_p, log_q = tables.log_p[row], tables.log_q[row]
        trusted = log_q > -jnp.inf
        usable = trusted & ~token_rule.is_degenerate(sequence, tables, row)
        # Z = P - (the sum of min(P p, q)), of which the drafted token is one term.
        most = prob - jnp.exp(jnp.minimum(log_prob + log_p, log_q)) + BOUND_SLACK
        u = joint.uniform[jnp.maximum(row - 1, 0)]
        kept = jnp.where(usable, u * (most + 1 - prob) < most, u < prob)
        possible = (going > 0) & (kept | (row == 0))
        joint.log_prob[row] = log_prob
        joint.possible[row] = jnp.where(possible, 1, 0)
        search = Search(
            jnp.where((going > 0) & ~usable, row, search.end),
            jnp.where(possible, row, search.first),
            jnp.where(possible & ((prob >= 1) | (row == 0)), row, search.sure),
        )
        log_prob = jnp.minimum(log_prob + jnp.where(trusted, log_p - log_q, -jnp.inf), 0.0)
        return log_prob, jnp.where(usable, going, 0), search

    zero = jnp.int32(0)
    carry = jnp.float32(0), jnp.int32(1), Search(zero, zero, zero)
    return lax.fori_loop(0, sequence.num_draft + 1, step, carry)[2]


def is_possible(joint: Joint, search: Search, row: Any) -> jax.Array:
    """Whether the sequence may stop at a row before its end."""
    return (joint.possible[row] > 0) & (row >= search.sure) & (row <= search.first)


def last_row(
    joint: Joint, search: Search, sum_fn: Callable[[Any], None], total_fn: Callable[[Any], jax.Array]
) -> jax.Array:
    """The row at which the sequence stops.

    `sum_fn(row)` is called for each row that is tried. `total_fn(row)` is then the sum of its weights.
    """

    def before(row):
        def step(other, best):
            return jnp.where((other < row) & (joint.possible[other] > 0), other, best)

        return lax.fori_loop(0, row, step, jnp.int32(0))

    def step(carry):
        row, _ = carry
        sum_fn(row)

        def accept():
            total, rest = total_fn(row), 1 - jnp.exp(joint.log_prob[row])
            # u < Z / (Z + 1 - P) without the division.
            return joint.uniform[jnp.maximum(row - 1, 0)] * (total + rest) < total

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
