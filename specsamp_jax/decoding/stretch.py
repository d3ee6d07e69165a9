"""The loop over all steps of a text. A stretch is a loop over consecutive steps of one draft length."""

import functools
from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from specsamp_jax.decoding.catch_up import catch_up, is_behind, may_miss_tokens
from specsamp_jax.decoding.drafters import Drafter
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.num_draft import (
    NumDraft,
    compiled_lengths,
    longest,
    most_steps,
    next_index,
    runs_next,
    settle,
    with_counts,
)
from specsamp_jax.decoding.state import DecodeState
from specsamp_jax.decoding.stats import Counts

Carry = tuple[DecodeState, Counts]


def run_steps(
    advance_fn: Callable[[int, Carry], Carry],
    unfinished_fn: Callable[[Carry], Bool[Array, ""]],
    carry: Carry,
    *,
    drafter: Drafter | None,
    num_draft: NumDraft,
) -> Carry:
    """Returns the state and the counts after all steps.

    Consecutive steps of one length run in a loop of their own. With `GoodputNumDraft` that loop computes only what the
    loop of a fixed length computes. A GPU waits for the host at each condition: one per step, as with a fixed length,
    and three between two loops.

    Args:
      advance_fn: `(length, carry) -> carry`: one step of a length that is compiled in, which chooses no new length.
      unfinished_fn: `carry -> whether another step follows`.
      carry: The state and the counts before the first step.
      drafter: The drafter.
      num_draft: The rule that chooses the length of each step.
    """
    compiled = compiled_lengths(num_draft)
    if len(compiled) == 1:
        return lax.while_loop(unfinished_fn, functools.partial(advance_fn, compiled[0]), carry)
    stretch_fn = functools.partial(_stretch, advance_fn, unfinished_fn, num_draft)
    if compiled[0] > 0 or not may_miss_tokens(carry[0], drafter):
        return lax.while_loop(unfinished_fn, functools.partial(stretch_fn, range(len(compiled))), carry)

    # A drafter with a cache misses the tokens of steps of length 0. Stretches of these have a loop of their own, so
    # that no condition between two stretches with drafts asks whether there is something to read.
    def is_plain(carry):
        return unfinished_fn(carry) & (longest(carry[0]) == 0)

    def drafts(carry):
        carry, begin = carry
        state, counts = carry
        # Before a probe the drafter read only the last missing tokens; before further steps it reads the others.
        has_all = (counts.num_steps == begin) | ~is_behind(state)
        return unfinished_fn(carry) & (longest(state) > 0) & has_all

    def body(carry):
        state, counts = lax.while_loop(is_plain, functools.partial(stretch_fn, [0]), carry)
        carry = catch_up(state, drafter), counts

        def draft(carry):
            return stretch_fn(range(1, len(compiled)), carry[0]), carry[1]

        return lax.while_loop(drafts, draft, (carry, counts.num_steps))[0]

    return lax.while_loop(unfinished_fn, body, carry)


def _stretch(
    advance_fn: Callable[[int, Carry], Carry],
    unfinished_fn: Callable[[Carry], Bool[Array, ""]],
    num_draft: NumDraft,
    indices: Sequence[int],
    carry: Carry,
) -> Carry:
    """Returns the carry after all steps of the present length, which is one of `indices`, with the next one chosen."""
    state, before = carry
    compiled = compiled_lengths(num_draft)
    same_for_all_rows = isinstance(num_draft, GoodputNumDraft)

    def run(index, carry):
        most = most_steps(num_draft, index, state)

        def advance(carry):
            if not same_for_all_rows:
                return advance_fn(compiled[index], carry)
            # The draft length is a constant, so that no kernel masks drafts of rows that ask for fewer.
            length = jnp.full_like(state.num_draft, compiled[index])
            after, counts = advance_fn(compiled[index], (carry[0]._replace(num_draft=length), carry[1]))
            return after._replace(num_draft=()), counts

        def goes_on(carry):
            after, counts = carry
            # The first step was chosen. Without it the outer loop might repeat this choice for ever.
            more = (counts.num_steps < before.num_steps + most) & runs_next(num_draft, index, after)
            return unfinished_fn(carry) & ((counts.num_steps == before.num_steps) | more)

        return lax.while_loop(goes_on, advance, carry)

    branches = [functools.partial(run, index) for index in indices]
    # Arrays that no branch changes are kept out of the branches, which would copy them.
    inside = state._replace(num_draft=(), num_draft_state=()) if same_for_all_rows else state
    if len(branches) == 1:
        after, counts = branches[0]((inside, before))
    else:
        after, counts = lax.switch(next_index(num_draft, state) - indices[0], branches, (inside, before))
    if same_for_all_rows:
        after = after._replace(num_draft=state.num_draft, num_draft_state=state.num_draft_state)
        after = with_counts(after, *_since_choice(state, before, counts))
    return settle(num_draft, after), counts


def _since_choice(state: DecodeState, before: Counts, after: Counts) -> tuple[Array, Array]:
    """Tokens and accepted drafts of each row since the last choice of `GoodputNumDraft`, after a stretch."""
    rule = state.num_draft_state
    # In this order XLA need not keep the counts of before the stretch.
    num_emitted, num_accepted = before.num_emitted - rule.num_emitted, before.num_accepted - rule.num_accepted
    return after.num_emitted - num_emitted, after.num_accepted - num_accepted
