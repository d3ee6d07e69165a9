"""Rounds of the block rule: a coin and a token drawn from p each, in place of sums over residuals.

A sequence that does not keep all its n drafts begins at row i = n - 1. A round at row i tosses a coin c. If `c >= P_i`,
the next round is at row i - 1. Else a token y is drawn from p at row i. If `c < P_i - q(y)/p(y)`, the sequence keeps i
drafts and y follows them; else the next round is at row i again.

So a round ends at row i with the token y with probability `p(y) max(P_i - q(y)/p(y), 0) = max(P_i p(y) - q(y), 0)`,
with any token with probability `Z_{i+1}`, the sum of these, and steps back with probability `1 - P_i`. Row i is then
the last with probability `Z_{i+1} / (Z_{i+1} + 1 - P_i)`, which is `h_i`, and y has the law of the residual.

The row of each round follows from the coins alone. Rows are tried from the right, one per sequence at a time: a pass
over p for the sums of its tiles, then groups of rounds, each of which reads one tile of p and single elements of q.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import Uniforms
from specsamp_jax.rules import emit
from specsamp_jax.sampling import draw
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.mesh_axes import vary_like

GROUP = 8
"""Number of rounds at a time. Most sequences end within as many; each reads a tile, so that more cost time."""


class Outcome(NamedTuple):
    """State of the sequences in their rounds.

    Attributes:
      decided: Whether `row` and `token` are final.
      row: The number of accepted drafts. Where undecided, that of the next round; while rounds are left, that of the
        next round which draws a token, or -1.
      token: The token after the accepted drafts; undefined where undecided.
    """

    decided: Bool[Array, "B"]
    row: Int[Array, "B"]
    token: Int[Array, "B"]


class _Plan(NamedTuple):
    """The rounds that draw a token at each row: from `begin` on and before `end`, none where these are equal.

    Attributes:
      begin: First round at the row.
      end: The round at the row whose coin steps back, or the number of rounds.
      last_row: The row after all rounds.
    """

    begin: Int[Array, "B K1"]
    end: Int[Array, "B K1"]
    last_row: Int[Array, "B"]


class _Group(NamedTuple):
    """State of the search among the rounds of one row.

    Attributes:
      begin: First round of the next group.
      decided: As in `Outcome`.
      token: As in `Outcome`.
    """

    begin: Int[Array, "B"]
    decided: Bool[Array, "B"]
    token: Int[Array, "B"]


def try_rounds(
    target: dist.Rows,
    drafter: dist.Rows,
    joint: Float[Array, "B K1"],
    num_usable: Int[Array, "B"],
    uniforms: Uniforms,
    vocab_size: int,
) -> Outcome:
    """Returns where the rounds of each sequence end; `joint` are P_0 to P_K, with K > 0.

    A sequence that keeps all of its `num_usable` drafts is decided: its token comes from p. Rows with a greedy target
    play no rounds: in the search by sums their result depends on no uniform.
    """
    assert uniforms.rounds is not None
    last_draft = joint.shape[1] - 2
    u = dist.take_row(jnp.pad(uniforms.accept, ((0, 0), (1, 0))), num_usable)
    keeps_all = u < dist.take_row(joint, num_usable)
    plays = ~keeps_all if target.filter.greedy is None else ~(keeps_all | target.filter.greedy)
    plan = _plan(uniforms.rounds[:, 0], joint, num_usable, keeps_all, plays)
    # One more round, for the sequences that keep all.
    emitted = jnp.pad(uniforms.emit, ((0, 0), (1, 0)))[..., None]
    rounds = jnp.concatenate([uniforms.rounds, emitted], axis=2)
    index, order = (jnp.arange(n, dtype=jnp.int32) for n in (last_draft + 2, GROUP))

    def largest(limit):
        """The largest row up to `limit` that draws a token, or -1."""
        return jnp.where((plan.begin < plan.end) & (index <= limit[:, None]), index, -1).max(1)

    def try_row(state: Outcome) -> Outcome:
        row = jnp.maximum(state.row, 0)
        end = jnp.where(state.row >= 0, dist.take_row(plan.end, row), 0)
        most = dist.take_row(joint, row)[:, None]
        sums = draw.tile_sums(dist.probs(target.take(row), vocab_size))

        def play(group: _Group) -> _Group:
            number = group.begin[:, None] + order
            coin, u_tile, u_token = (_elements(rounds[:, i], number) for i in range(3))
            token = _sample(target, row, sums, vocab_size, u_tile, u_token)
            log_p = dist.log_prob_at(target, row, token)
            log_q = dist.log_prob_at(drafter, jnp.minimum(row, last_draft), token)
            accepted = (log_p > -jnp.inf) & (coin < most - emit.exp(dist.log_ratio(log_q, log_p)))
            accepted = (keeps_all[:, None] | accepted) & (number < end[:, None])
            first = jnp.where(accepted, order, GROUP).min(1)
            token = _elements(token, first[:, None])[:, 0]
            return _Group(
                group.begin + GROUP,
                group.decided | (first < GROUP),
                jnp.where(group.decided, group.token, token),
            )

        group = _Group(dist.take_row(plan.begin, row), state.decided, state.token)
        group = lax.while_loop(lambda group: (~group.decided & (group.begin < end)).any(), play, group)
        return Outcome(group.decided, jnp.where(group.decided, state.row, largest(state.row - 1)), group.token)

    state = Outcome(jnp.zeros_like(keeps_all), largest(num_usable), jnp.zeros_like(num_usable))
    state = vary_like(state, (target, drafter, joint, num_usable, uniforms))
    state = lax.while_loop(lambda state: (~state.decided & (state.row >= 0)).any(), try_row, state)
    return state._replace(row=jnp.where(state.decided, state.row, plan.last_row))


def _plan(coins, joint, num_usable, keeps_all, plays) -> _Plan:
    """The rounds of each row; a sequence that keeps all draws in one more round than there are coins."""
    num_rounds, num_draft = coins.shape[1], joint.shape[1] - 1
    order, index = (jnp.arange(n, dtype=jnp.int32) for n in (num_rounds, num_draft + 1))
    used = plays[:, None] & (index[:-1] < num_usable[:, None])

    def step(begin, row):
        """The rounds of one row, the first of which is `begin`; returns the first of the row before it."""
        used, joint = row
        back = (order >= begin[:, None]) & (coins >= joint[:, None])
        end = jnp.where(used, jnp.where(back, order, num_rounds).min(1), begin)
        return jnp.where(used, jnp.minimum(end + 1, num_rounds), begin), (begin, end, used & (end < num_rounds))

    begin = vary_like(jnp.zeros_like(num_usable), (coins, joint, used))
    _, (begin, end, back) = lax.scan(step, begin, (used.T, joint[:, :-1].T), reverse=True)
    begin, end = (jnp.pad(array.T, ((0, 0), (0, 1))) for array in (begin, end))
    own = keeps_all[:, None] & (index == num_usable[:, None])
    last_row = num_usable - 1 - back.sum(0, dtype=num_usable.dtype)
    return _Plan(jnp.where(own, num_rounds, begin), jnp.where(own, num_rounds + 1, end), last_row)


def _sample(target, row, sums, vocab_size, u_tile, u_token) -> Int[Array, "B n"]:
    """Samples n tokens from one row of p per sequence, the sums of whose tiles are given."""
    tile = draw.sample_index(sums[:, None], u_tile)
    tokens = draw.tile_tokens(tile)[..., :vocab_size]
    weights = emit.exp(dist.log_prob_at(target, row, tokens.reshape(tokens.shape[0], -1)))
    return draw.sample_in_tile(tile, weights.reshape(tokens.shape), u_token)


def _elements(array: Array, index: Int[Array, "B n"]) -> Array:
    """Elements of each row of `[B, N]`; an index beyond the row reads the last."""
    return jnp.take_along_axis(array, index, axis=1, mode="clip")
