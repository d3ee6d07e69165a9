"""Data and state of `GoodputNumDraft`, and the steps until its next choice and its next probe."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.decoding import probes


class Measured(NamedTuple):
    """The part of a `GoodputNumDraft` that is data. K is the longest length, N the number of lengths.

    Attributes:
      costs: Time of a step at each length, and that of a change of the length.
      prior: Acceptance at each position before there are observations.
      first: The first choice, a `FirstChoice` as an array: made of the other data, the rule and the sizes of the batch.
    """

    costs: Float[Array | np.ndarray, "N1"]
    prior: Float[Array | np.ndarray, "K"]
    first: Float[Array | np.ndarray, "4"]


class FirstChoice(NamedTuple):
    """The choice before the first step. All are whole numbers that float32 holds, but for `num_expected`.

    Attributes:
      choice: Index of the length.
      interval: Steps with drafts to the next choice.
      wait: Tokens of a row before the first probe; -1 if there is none.
      num_expected: Expected tokens of a step of the length after it.
    """

    choice: Any
    interval: Any
    wait: Any
    num_expected: Any


class GoodputState(NamedTuple):
    """Observations and the present choice; the batch first, so that rows can be replaced. K is the longest length.

    A step of length 0 changes only `probing`, if a probe is due. All steps between two choices have one length, except
    for steps of length 0 before a probe.

    Attributes:
      costs: Time of a step at each length, and that of a change of the length.
      prior: Acceptance at each position before there are observations.
      tried: Number of steps until the last choice in which all drafts before each position were accepted; older steps
        count less.
      accepted: Number of these steps in which the draft at the position was accepted too.
      num_emitted: Tokens of each row in steps with drafts since the last choice.
      num_accepted: Accepted drafts by position since the last choice. Integers: their sum does not depend on its order.
      choice: Index of the chosen length.
      probing: Whether the next step probes the length after the chosen one.
      probe_at: Tokens of the text at which the next probe is due, or `probes.NEVER`.
      num_failed: Probes since the last that raised the expected number of tokens, or since the choice changed.
      num_seen: Tokens of the text that are in the drafter's cache without a gap.
      interval: Steps with drafts from the last choice to the next.
      num_expected: Expected tokens of a step of the length after the chosen one, as of the last choice.
    """

    costs: Float[Array, "B N1"]
    prior: Float[Array, "B K"]
    tried: Float[Array, "B K"]
    accepted: Float[Array, "B K"]
    num_emitted: Int[Array, "B"]
    num_accepted: Int[Array, "B K"]
    choice: Int[Array, "B"]
    probing: Bool[Array, "B"]
    probe_at: Int[Array, "B"]
    num_failed: Int[Array, "B"]
    num_seen: Int[Array, "B"]
    interval: Int[Array, "B"]
    num_expected: Float[Array, "B"]


export.register_namedtuple_serialization(GoodputState, serialized_name="specsamp_jax.GoodputState")


class Rows(NamedTuple):
    """The rows of a batch, as a choice sees them.

    Attributes:
      unfinished: Rows that have not finished.
      lengths: Tokens of each row.
      remaining: Tokens from there to each row's limit.
    """

    unfinished: Bool[Array, "B"]
    lengths: Int[Array, "B"]
    remaining: Int[Array, "B"]


def next_length(lengths: tuple[int, ...], state: GoodputState) -> Int[Array, ""]:
    """Returns the draft length of the next step, which is that of all steps since the last choice too."""
    return jnp.array(lengths, jnp.int32)[state.choice.max(initial=0) + state.probing.any().astype(jnp.int32)]


def num_steps(state: GoodputState) -> Int[Array, "B"]:
    """Returns the number of steps that each row has made since the last choice.

    A step of an unfinished row emits a token more than it accepts. One that a limit cuts short is not counted.
    """
    return state.num_emitted - state.num_accepted.sum(1, dtype=jnp.int32)


def num_steps_to_choice(lengths: tuple[int, ...], state: GoodputState) -> Int[Array, ""]:
    """Returns the number of steps with drafts until `goodput.settle` chooses again: one if the next is a probe."""
    num_waiting = jnp.where(next_length(lengths, state) > 0, num_steps(state).max(initial=0), 0)
    return jnp.where(state.probing.any(), 1, state.interval.max(initial=0)) - num_waiting


def num_steps_to_probe(probe_share: float, state: GoodputState, rows: Rows) -> Int[Array, ""]:
    """Returns the number of steps of length 0, at least 1, until `goodput.settle` may start a probe.

    Each gives a row one token, so a loop of them need not ask after each whether a probe is due. If a row finishes
    before it reaches its probe, `goodput.settle` finds that none is due.
    """
    if probe_share == 0:
        return jnp.int32(probes.NEVER)
    left = jnp.where(rows.unfinished, state.probe_at - rows.lengths, probes.NEVER)
    return jnp.maximum(left.min(initial=probes.NEVER), 1)


def probe_is_due(probe_share: float, state: GoodputState, rows: Rows) -> Bool[Array, ""]:
    """Whether the text of an unfinished row has reached its next probe."""
    return (rows.unfinished & (rows.lengths >= state.probe_at)).any() & (probe_share > 0)
