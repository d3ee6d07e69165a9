"""Draft length by goodput: the number of expected tokens per second, from measured acceptance and measured costs."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from specsamp_jax import _checks
from specsamp_jax.decoding import expected_tokens, probes
from specsamp_jax.decoding.goodput_state import (
    FirstChoice,
    GoodputState,
    Measured,
    Rows,
    next_length,
    num_steps,
    num_steps_to_choice,
    probe_is_due,
)

_MOST_INTERVALS = 8  # of `steps_per_choice`, to the next choice
_MOST_STEPS = 2**24  # between two choices; float32 holds all whole numbers up to it


@dataclasses.dataclass(frozen=True)
class GoodputNumDraft:
    """The draft length that promises the most tokens per second; 0, plain decoding, where drafting does not pay.

    After `steps_per_choice` steps with drafts, and after each probe, the rule estimates for each of `lengths` when the
    last row would end. A row with R tokens left takes about R / m steps, where m = 1 + a_1 + a_1 a_2 + ..., and a_i is
    the running acceptance at position i, given that all drafts before it were accepted; drafts that a drafter did not
    propose count as rejected. A row's estimate is shrunk to that of all rows, and this to `prior`. The time to the end
    is the expected number of steps of the slowest row times the cost of a step. The rule switches to the length with
    the least time if that, longer by the share `hysteresis` and by `change_cost`, is less than the time of the present
    length. A choice that keeps the length doubles the number of steps to the next choice, up to eight times
    `steps_per_choice`; a choice that changes it resets this number. If no other length could be better even with all
    drafts accepted, the rule chooses after probes only. The first length is the best by `costs` and `prior`, or the
    shortest if that is as good but for `hysteresis`.

    Acceptance beyond the present length is not observed, so the next longer length is tried from time to time. The
    wait, in steps, is the expected loss of such a probe, `change_cost` included, divided by `probe_share` of a step's
    cost, and between 8 and 4,096. It doubles, at most three times, after each probe that does not raise the expected
    number of tokens. There is no probe if no row has tokens for two such waits left. A drafter does not run in steps of
    length 0. Before a probe it reads the last 32 tokens, before other steps all that it missed: the prompts too, if the
    first step drafts nothing.

    The length of a step is a function of earlier steps: their counts of accepted drafts, the number of rows that have
    finished, the tokens that each has left, and the numbers of the rule. It never depends on the drafts of the step
    itself, which would change the distribution of the text (see `Draft`). So each row's text has exactly the target's
    distribution. It is not the same text in another batch or under other costs, because one length serves all rows:
    where a seed must reproduce a text, use a fixed draft length, or `HeuristicNumDraft`, or a temperature of 0. Rows of
    one batch need different keys, as `generate` makes them of one key: a row whose key another row has would make the
    draws that this row's acceptance, and so the common length, came from.

    Attributes:
      costs: Time of a step at each of `lengths`, in any unit; `measure_goodput` measures it.
      lengths: The draft lengths that are compiled, ascending.
      hysteresis: Share by which another length must be better than the present one.
      memory: Observations that the running acceptance of a row remembers.
      probe_share: Expected share of the time that probes may cost.
      prior: Acceptance before there are observations. One number per position, such as `measure_goodput` finds, counts
        as 50 observations by each row. One number for all counts as 2 of the first position; the estimate of a
        position is then the prior of the next.
      steps_per_choice: Fewest steps with drafts between two choices: on a GPU a choice is 20 to 40 small kernels.
      change_cost: Time that the first step of a length takes longer than others, in the unit of `costs`;
        `measure_goodput` measures it.

    Example:
      >>> rule = GoodputNumDraft(costs=(1.0, 1.2, 1.4), lengths=(0, 1, 2))
      >>> [rule.best((rate, rate)) for rate in (0.1, 0.3, 0.8)]
      [0, 1, 2]
    """

    costs: tuple[float, ...]
    lengths: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)
    hysteresis: float = 0.02
    memory: float = 100.0
    probe_share: float = 0.005
    prior: float | tuple[float, ...] = 0.7
    steps_per_choice: int = 16
    change_cost: float = 0.0

    def __post_init__(self):
        _checks.lengths("GoodputNumDraft.lengths", self.lengths, 0)
        costs, infinity = self.costs, float("inf")
        if not _is_tuple(costs, len(self.lengths)) or not all(0 < cost < infinity for cost in costs):
            raise ValueError(
                "GoodputNumDraft.costs must be one positive number for each of lengths, "
                f"{self.lengths}, in a tuple; got {costs}. See measure_goodput."
            )
        for name, least, largest in (
            ("hysteresis", 0, 1),
            ("memory", 1, infinity),
            ("probe_share", 0, 1),
            ("change_cost", 0, infinity),
        ):
            value = vars(self)[name]
            if not _checks.is_number(value) or not least <= value <= largest:
                raise ValueError(f"GoodputNumDraft.{name} must be from {least} to {largest}; got {value}.")
        _checks.count("GoodputNumDraft.steps_per_choice", self.steps_per_choice, 1)
        if self.steps_per_choice > _MOST_STEPS:
            raise ValueError(
                f"GoodputNumDraft.steps_per_choice must be at most {_MOST_STEPS}; got {self.steps_per_choice}."
            )
        rates = self.prior if isinstance(self.prior, tuple) else (self.prior,) * self.lengths[-1]
        if not _is_tuple(rates, self.lengths[-1]) or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(
                "GoodputNumDraft.prior must be from 0 to 1, one number or one for each position, "
                f"{self.lengths[-1]} in all; got {self.prior}."
            )

    def best(self, acceptance: tuple[float, ...]) -> int:
        """Returns the best draft length for a share of accepted drafts per position, given those before it."""
        rates = jnp.asarray(acceptance, jnp.float32)
        return self.lengths[int(jnp.argmax(expected_tokens.num_tokens(rates, self.lengths) / jnp.asarray(self.costs)))]


def _is_tuple(value: Any, size: int) -> bool:
    """Whether a value is a tuple of `size` Python numbers: a rule that is compiled in must be hashable."""
    return isinstance(value, tuple) and len(value) == size and all(map(_checks.is_number, value))


def start(rule: GoodputNumDraft, data: Measured, lengths: Int[Array, "B"]) -> tuple[Int[Array, "B"], GoodputState]:
    """Returns the draft length of each row's first step and the state before it. See `first_choice.measured`."""
    batch_size, longest = lengths.shape[0], rule.lengths[-1]
    none, never = jnp.zeros((batch_size, longest), jnp.float32), jnp.zeros((batch_size,), bool)
    zeros, no_counts = jnp.zeros((batch_size,), jnp.int32), jnp.zeros((batch_size, longest), jnp.int32)
    first = FirstChoice(*jnp.asarray(data.first))
    wait = first.wait.astype(jnp.int32)
    state = GoodputState(
        costs=jnp.broadcast_to(data.costs, (batch_size, len(rule.lengths) + 1)),
        prior=jnp.broadcast_to(data.prior, (batch_size, longest)),
        tried=none,
        accepted=none,
        num_emitted=zeros,
        num_accepted=no_counts,
        choice=zeros + first.choice.astype(jnp.int32),
        probing=never,
        probe_at=jnp.where(wait < 0, probes.NEVER, lengths + wait),
        num_failed=zeros,
        num_seen=lengths,
        interval=zeros + first.interval.astype(jnp.int32),
        num_expected=jnp.broadcast_to(first.num_expected, lengths.shape),
    )
    return jnp.broadcast_to(next_length(rule.lengths, state), lengths.shape), state


def settle(rule: GoodputNumDraft, state: GoodputState, rows: Rows) -> tuple[Int[Array, "B"], GoodputState]:
    """Returns the draft length of each row's next step, and the state before it, chosen anew where that is due.

    Nothing changes between two choices, so a loop may call it after each step, or after the steps of one choice.
    `state` has the counts of all steps since the last choice.
    """
    chooses = num_steps_to_choice(rule.lengths, state) <= 0
    drafted = next_length(rule.lengths, state) > 0
    # The drafter reads its drafts as it draws them: all but the last two tokens are there, whatever was accepted.
    has_gap = state.probing.any() & (jnp.array(rule.lengths)[state.choice.max(initial=0)] == 0)
    num_seen = jnp.where(drafted & ~has_gap, rows.lengths - 2, state.num_seen)
    chosen = _choose(rule, _with_observations(rule, state), rows)
    state = GoodputState(*(jnp.where(chooses, new, old) for new, old in zip(chosen, state, strict=True)))
    choice = state.choice.max(initial=0)
    longer = probes.longer(rule.lengths, choice)
    plain = jnp.array(rule.lengths)[choice] == 0
    # Where steps draft, a probe follows a choice.
    may_change = chooses | plain
    probing = may_change & (longer > choice) & probe_is_due(rule.probe_share, state, rows)
    probing |= ~may_change & state.probing.any()
    state = state._replace(
        num_seen=num_seen,
        probing=jnp.broadcast_to(probing, rows.unfinished.shape),
        # Steps without drafts are no observations.
        num_emitted=jnp.where(drafted, state.num_emitted, 0),
        num_accepted=jnp.where(drafted, state.num_accepted, 0),
    )
    return jnp.broadcast_to(next_length(rule.lengths, state), rows.unfinished.shape), state


def _with_observations(rule: GoodputNumDraft, state: GoodputState) -> GoodputState:
    """The state with the counts since the last choice among its observations."""
    tried = jnp.concatenate([num_steps(state)[:, None], state.num_accepted[:, :-1]], axis=1)
    tried = jnp.where(jnp.arange(tried.shape[1]) < next_length(rule.lengths, state), tried, 0)
    # A step that a limit cut short is not counted as a step, but its accepted drafts are.
    tried = jnp.maximum(tried, state.num_accepted).astype(jnp.float32)
    keep = jnp.float32(1 - 1 / rule.memory) ** tried
    return state._replace(
        tried=state.tried * keep + tried,
        accepted=state.accepted * keep + state.num_accepted.astype(jnp.float32),
        num_emitted=jnp.zeros_like(state.num_emitted),
        num_accepted=jnp.zeros_like(state.num_accepted),
    )


def _choose(rule: GoodputNumDraft, state: GoodputState, rows: Rows) -> GoodputState:
    """The state with a new choice, and with the text length at which the next probe is due."""
    costs, prior = state.costs.max(0, initial=0), state.prior.max(0, initial=0)
    left = jnp.where(rows.unfinished, rows.remaining, 0)
    is_measured = isinstance(rule.prior, tuple)
    num_tokens, time = expected_tokens.estimates(
        rule.lengths, costs[:-1], prior, state.tried, state.accepted, left, is_measured=is_measured
    )
    old, best = state.choice.max(initial=0), jnp.argmin(time).astype(jnp.int32)
    choice = jnp.where(time[best] * (1 + rule.hysteresis) + costs[-1] < time[old], best, old)
    probing, changed = state.probing.any(), choice != old
    raised = probing & (num_tokens[probes.longer(rule.lengths, old)] > state.num_expected.max(initial=0))
    num_failed = jnp.where(changed | raised, 0, state.num_failed.max(initial=0) + probing.astype(jnp.int32))
    shape = rows.unfinished.shape
    num_failed = jnp.broadcast_to(num_failed, shape)
    longer = jnp.minimum(state.interval * jnp.where(probing, 1, 2), _MOST_INTERVALS * rule.steps_per_choice)
    interval = probes.interval(rule.lengths, rule.probe_share, costs, num_tokens, choice, num_failed)
    # A probe is not put off by a choice that changes nothing.
    latest = jnp.where(changed | probing, probes.NEVER, state.probe_at)
    due = jnp.minimum(latest, rows.lengths + interval)
    return state._replace(
        choice=jnp.broadcast_to(choice, shape),
        interval=jnp.where(changed, rule.steps_per_choice, longer),
        probe_at=probes.probe_at(due, interval, rows.lengths + rows.remaining),
        num_failed=num_failed,
        num_expected=jnp.broadcast_to(num_tokens[probes.longer(rule.lengths, choice)], shape),
    )
