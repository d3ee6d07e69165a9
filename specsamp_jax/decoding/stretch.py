"""All steps of a text, in stretches of steps with the same draft length."""

import functools
from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Bool

from specsamp_jax._types import Stats
from specsamp_jax.decoding.catch_up import catch_up
from specsamp_jax.decoding.drafters import Drafter
from specsamp_jax.decoding.num_draft import NumDraft, compiled_lengths, is_probe, next_index, runs_next
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

    Consecutive steps of one length run in a loop of their own. So a conditional is passed once per change of the
    length, not once per step, and steps of length 0 run in the same loop as without a drafter.

    Args:
      advance_fn: `(length, carry) -> carry`: one step of a length that is compiled in.
      unfinished_fn: `carry -> whether another step follows`.
      carry: The state and the counts before the first step.
      drafter: The drafter.
      num_draft: The rule that chooses the length of each step.
    """
    compiled = compiled_lengths(num_draft)
    if len(compiled) == 1:
        return lax.while_loop(unfinished_fn, functools.partial(advance_fn, compiled[0]), carry)

    def stretch(index, carry):
        probes = is_probe(carry[0])

        def goes_on(carry):
            same = runs_next(num_draft, index, carry[0]) & (is_probe(carry[0]) == probes)
            return unfinished_fn(carry) & same

        return lax.while_loop(goes_on, functools.partial(advance_fn, compiled[index]), carry)

    branches = [functools.partial(stretch, index) for index in range(len(compiled))]

    def body(carry):
        state, stats = carry
        # The drafter reads before a stretch what it missed. Within a stretch it misses nothing.
        return lax.switch(next_index(num_draft, state), branches, (catch_up(state, drafter), stats))

    return lax.while_loop(unfinished_fn, body, carry)
