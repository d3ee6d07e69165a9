"""All steps of a text, in stretches of steps with the same draft length."""

import functools
from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Bool

from specsamp_jax._types import Stats
from specsamp_jax.decoding.catch_up import catch_up
from specsamp_jax.decoding.drafters import Drafter
from specsamp_jax.decoding.num_draft import (
    NumDraft,
    compiled_lengths,
    count_steps,
    most_steps,
    next_index,
    runs_next,
    settle,
)
from specsamp_jax.decoding.state import DecodeState

Carry = tuple[DecodeState, Stats]


def run_steps(
    advance_fn: Callable[[int, Carry], Carry],
    unfinished_fn: Callable[[Carry], Bool[Array, ""]],
    carry: Carry,
    *,
    drafter: Drafter | None,
    num_draft: NumDraft,
) -> Carry:
    """Returns the state and the counts after all steps.

    Consecutive steps of one length run in a loop of their own. So the conditional and the choice of the next length are
    passed once per loop, not once per step, and steps of length 0 run in the same loop as without a drafter.

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

    def stretch(index, carry):
        state, stats = carry
        begin, most = stats.num_steps, most_steps(num_draft, index, state)

        def goes_on(carry):
            state, stats = carry
            # The first step was chosen. Without it the outer loop might repeat this choice for ever.
            more = (stats.num_steps < begin + most) & runs_next(num_draft, index, state)
            return unfinished_fn(carry) & ((stats.num_steps == begin) | more)

        state, stats = lax.while_loop(goes_on, functools.partial(advance_fn, compiled[index]), carry)
        return count_steps(num_draft, compiled[index], state, stats.num_steps - begin), stats

    branches = [functools.partial(stretch, index) for index in range(len(compiled))]

    def body(carry):
        state, stats = carry
        # The drafter reads before a stretch what it missed. Within a stretch it misses nothing.
        state, stats = lax.switch(next_index(num_draft, state), branches, (catch_up(state, drafter), stats))
        return settle(num_draft, state), stats

    return lax.while_loop(unfinished_fn, body, carry)
