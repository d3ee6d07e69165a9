"""The block rule: accepts drafts jointly; exact, and in expectation at least as many as the token rule accepts."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.rules.rounds import Outcome, try_rounds
from specsamp_jax.sampling import draw
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.mesh_axes import cond

BOUND_SLACK = 2.0**-20
"""Added to the upper bound of a residual's sum, for the rounding of its terms."""


class _Stop(NamedTuple):
    """State of the search for the last accepted draft, from the right.

    Attributes:
      num_accepted: The candidate; the number of accepted drafts once `decided` is True.
      decided: Whether the search of the sequence has ended.
    """

    num_accepted: Int[Array, "B"]
    decided: Bool[Array, "B"]


def verify_block(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
) -> Verification:
    """Returns the verification by the block rule of Sun et al. (2024, arXiv 2403.10444, algorithm 2).

    With `P_i = min(P_{i-1} p_i(x_i)/q_i(x_i), 1)` and `Z_{i+1} = sum_v max(P_i p_{i+1}(v) - q_{i+1}(v), 0)`, a
    sequence keeps i of its n drafts for the largest i with `u_i < h_i`, where `h_n = P_n`, `h_0 = 1` and else
    `h_i = Z_{i+1} / (Z_{i+1} + 1 - P_i)`; its last token has weights `max(P_i p_{i+1} - q_{i+1}, 0)`, or p after n
    drafts.

    With `uniforms.rounds`, those that do not keep all drafts decide in rounds which need no `Z` (`rounds.try_rounds`).
    A sequence that is undecided after all rounds goes on from its row by the rule above, with the uniforms that are not
    used yet: that no round ended it says nothing about the next one.

    `Z_{i+1}` takes a pass over a row, but is at most `P_i - min(P_i p_{i+1}(x), q_{i+1}(x))` for the next draft x, and
    `h_i` is 1 if `P_i` is 1. So positions are tried from the right, one row per sequence at a time, only if `u_i` is
    below the bound of `h_i`, and only up to the first with `P_i = 1`.
    """
    tokens, vocab_size = draft.tokens, target_logits.shape[-1]
    num_draft = tokens.shape[1]
    target = dist.target_rows(target_logits, target_filter)
    drafter = dist.draft_rows(draft, draft_filter)

    scored = target.first(num_draft)
    log_p, log_q = dist.log_prob(scored, tokens), dist.log_prob(drafter, tokens)
    drafted = emit.draft_mask(tokens)
    # A draft is cut before a token of q = 0 and before a degenerate row of either model: the token after it is
    # sampled from p, or is the first largest logit if the target's row is degenerate.
    trusted = drafted & (log_q > -jnp.inf) & (tokens < vocab_size)
    num_usable = emit.num_leading(trusted & ~scored.degenerate)
    log_ratio = jnp.where(trusted, dist.log_ratio(log_p, log_q), -jnp.inf)
    log_joint = _log_joint_prob(log_ratio)
    joint = emit.exp(log_joint)

    def residual(num_accepted):
        """Weights `[B, V]` of the token after `num_accepted` drafts."""
        p = dist.probs(target.take(num_accepted), vocab_size)
        if num_draft == 0:
            return p
        row, rejecting = emit.last_draft_row(drafter, jnp.arange(num_draft) < num_usable[:, None], num_accepted)
        weights = jnp.maximum(dist.take_row(joint, num_accepted)[:, None] * p - dist.probs(row, vocab_size), 0)
        return jnp.where(rejecting, weights, p)

    def search(outcome: Outcome) -> tuple[Outcome, Bool[Array, "B"]]:
        """Decides the rest by the sums of residuals, from their rows on; also returns where a residual is zero."""
        # Z = P - (the sum of min(P p, q)), of which the drafted token is one term.
        overlap = emit.exp(jnp.minimum(log_joint[:, :-1] + log_p, log_q))
        possible = _possible(joint, joint[:, :-1] - overlap + BOUND_SLACK, num_usable, uniforms.accept)
        row = _num_accepted(joint, possible, num_usable, uniforms.accept, residual, outcome)
        p = functools.partial(dist.probs, target.take(row), vocab_size)
        token, empty = emit.sample_residual(residual(row), p, uniforms.emit)
        token = jnp.where(outcome.decided, outcome.token, token)
        return Outcome(jnp.ones_like(outcome.decided), row, token), ~outcome.decided & empty

    if num_draft == 0 or uniforms.rounds is None or uniforms.rounds.shape[2] == 0:
        outcome, empty = search(Outcome(jnp.zeros(num_usable.shape, bool), num_usable, jnp.zeros_like(num_usable)))
    else:
        tried = try_rounds(target, drafter, joint, num_usable, uniforms, vocab_size)
        none = jnp.zeros_like(tried.decided)
        outcome, empty = cond(tried.decided.all(), lambda: (tried, none), lambda: search(tried))
    num_accepted, last = outcome.row, target.take(outcome.row)
    last_logits = dist.take_row(target_logits, num_accepted)
    token = draw.replace_degenerate(outcome.token, last_logits, last.degenerate[:, 0])

    accept_prob = jnp.where(trusted & (log_p > -jnp.inf), emit.exp(jnp.minimum(log_ratio, 0)), 0)
    status = emit.status(
        emit.in_use(target.degenerate, num_accepted),
        emit.in_use(drafted & ~trusted, num_accepted),
        (num_accepted < num_usable) & ~last.degenerate[:, 0] & empty,
    )
    log_prob = dist.log_prob(last, token[:, None])[:, 0]
    return emit.pack(tokens, num_accepted, token, log_p, log_prob, accept_prob, status)


def _log_joint_prob(log_ratio: Float[Array, "B K"]) -> Float[Array, "B K1"]:
    """Logarithms of P_0 to P_K: sums of the log-ratios up to each draft, each sum clipped to 0."""
    log_prob, steps = jnp.zeros_like(log_ratio[:, :1]), []
    for i in range(log_ratio.shape[1]):
        steps.append(log_prob)
        log_prob = jnp.minimum(log_prob + log_ratio[:, i : i + 1], 0)
    return jnp.concatenate([*steps, log_prob], axis=1)


def _possible(joint, most, num_usable, uniforms) -> Bool[Array, "B K1"]:
    """Whether u_i can be below h_i at each position; `most` is an upper bound of each Z_{i+1}."""
    index = jnp.arange(1, joint.shape[1])
    most, inside = jnp.pad(most[:, 1:], ((0, 0), (0, 1))), index < num_usable[:, None]
    inner = uniforms * (most + 1 - joint[:, 1:]) < most
    last = (index == num_usable[:, None]) & (uniforms < joint[:, 1:])
    return jnp.concatenate([jnp.ones((joint.shape[0], 1), bool), jnp.where(inside, inner, last)], axis=1)


def _num_accepted(joint, possible, num_usable, uniforms, residual, outcome) -> Int[Array, "B"]:
    """The largest i up to `outcome.row` with u_i < h_i, by the sums of the weights of possible positions."""
    num_draft = uniforms.shape[1]
    if num_draft == 0:
        return outcome.row
    index = jnp.arange(num_draft + 1)

    def largest(limit):
        """The largest possible position up to `limit`."""
        return jnp.where(possible & (index <= limit[:, None]), index, 0).max(1).astype(num_usable.dtype)

    def body(stop: _Stop) -> _Stop:
        total = draw.tile_sums(residual(stop.num_accepted)).sum(-1)
        remaining = 1 - dist.take_row(joint, stop.num_accepted)
        u = dist.take_row(jnp.pad(uniforms, ((0, 0), (1, 0))), stop.num_accepted)
        # u < Z / (Z + 1 - P) without the division, which is 0/0 if p equals q and P is 1.
        accepted = (u * (total + remaining) < total) | (remaining <= 0)
        decided = stop.decided | accepted
        return _Stop(jnp.where(decided, stop.num_accepted, largest(stop.num_accepted - 1)), decided)

    first = jnp.where(outcome.decided, outcome.row, largest(outcome.row))
    certain = dist.take_row(joint, first) >= 1
    begin = _Stop(first, outcome.decided | (first == num_usable) | certain)
    return lax.while_loop(lambda stop: ~stop.decided.all(), body, begin).num_accepted
