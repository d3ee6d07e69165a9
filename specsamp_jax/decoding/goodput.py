"""Draft length by goodput: the number of expected tokens per second, from measured acceptance and measured costs."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import export
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax import _checks

CATCH_UP = 32
"""Tokens that a drafter reads at once if it was not run for some steps."""

NEVER = 2**31 - 1
"""Value of `GoodputState.probe_at` if no probe follows."""

_ASSUMED_WEIGHT, _MEASURED_WEIGHT = 2.0, 20.0  # of a prior, in observations: one number, or one per position
_SHORTEST_WAIT, _LONGEST_WAIT = 8, 4096  # steps between two probes
_MOST_DOUBLINGS = 3  # of the wait, after probes that failed


@dataclasses.dataclass(frozen=True)
class GoodputNumDraft:
    """The draft length that promises the most tokens per second; 0, plain decoding, where drafting does not pay.

    After each step the goodput of each of `lengths` is its expected number of tokens over its cost. The expected
    number is m = 1 + a_1 + a_1 a_2 + ..., where a_i is the running acceptance at position i, given that all drafts
    before it were accepted, of all rows together; drafts that a drafter did not propose count as rejected. It starts
    from `prior`. A batch ends with its slowest row, so with B unfinished rows, of which the longest has R tokens left,
    m is divided by 1 + z sqrt(v / (R m)): v is the variance of a step's tokens, z the expected largest of B normal
    draws. The step after that runs the length of highest goodput, if it is better than the present one by `hysteresis`.
    A row drafts fewer tokens where fewer are left to its limit.

    Acceptance beyond the present length is not observed, so the next longer length is tried from time to time. The
    wait is the expected loss of such a probe over `probe_share` of a step's cost, between 8 and 4,096 steps. It
    doubles, at most three times, after each probe that does not raise the expected number of tokens. There is no probe
    if no row has twice as many tokens left, for what it found would be of little use. A drafter does not run in steps
    of length 0. Before a probe it reads the last 32 tokens, before other steps all that it missed: the prompts too, if
    the first step drafts nothing.

    The length of a step is a function of earlier steps: their counts of accepted drafts, the number of rows that have
    finished, `costs` and `prior`. It never depends on the drafts of the step itself, which would change the
    distribution of the text (see `Draft`). So each row's text has exactly the target's distribution. It is not the same
    text in another batch or under other costs, because one length serves all rows: where a seed must reproduce a text,
    use a fixed draft length, or `HeuristicNumDraft`, or a temperature of 0.

    Attributes:
      costs: Time of a step at each of `lengths`, in any unit; `measure_goodput` measures it.
      lengths: The draft lengths that are compiled, ascending.
      hysteresis: Share by which another length must be better than the present one.
      memory: Observations that the running acceptance of a row remembers.
      probe_share: Expected share of the time that probes may cost.
      prior: Acceptance before there are observations. One number per position, such as `measure_goodput` finds, counts
        as 20 observations of each. One number for all counts as 2 of the first position; the estimate of a position is
        then the prior of the next.

    Example:
      >>> rule = GoodputNumDraft(costs=(1.0, 1.2, 1.4), lengths=(0, 1, 2))
      >>> [rule.best((rate, rate)) for rate in (0.1, 0.3, 0.8)]
      [0, 1, 2]
    """

    costs: tuple[float, ...]
    lengths: tuple[int, ...] = (0, 1, 2, 3, 4, 6, 8)
    hysteresis: float = 0.01
    memory: float = 100.0
    probe_share: float = 0.01
    prior: float | tuple[float, ...] = 0.7

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
        ):
            value = vars(self)[name]
            if not _checks.is_number(value) or not least <= value <= largest:
                raise ValueError(f"GoodputNumDraft.{name} must be from {least} to {largest}; got {value}.")
        rates = self.prior if isinstance(self.prior, tuple) else (self.prior,) * self.lengths[-1]
        if not _is_tuple(rates, self.lengths[-1]) or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError(
                "GoodputNumDraft.prior must be from 0 to 1, one number or one for each position, "
                f"{self.lengths[-1]} in all; got {self.prior}."
            )

    def best(self, acceptance: tuple[float, ...]) -> int:
        """Returns the best draft length for a share of accepted drafts per position, given those before it."""
        rates = jnp.asarray(acceptance, jnp.float32)
        return self.lengths[int(jnp.argmax(_num_tokens(rates, self.lengths) / jnp.asarray(self.costs)))]


def _is_tuple(value: Any, size: int) -> bool:
    """Whether a value is a tuple of `size` Python numbers: a rule that is compiled in must be hashable."""
    return isinstance(value, tuple) and len(value) == size and all(map(_checks.is_number, value))


class Measured(NamedTuple):
    """The part of a `GoodputNumDraft` that is data. K is the longest length, N the number of lengths.

    Attributes:
      costs: Time of a step at each length.
      prior: Acceptance at each position before there are observations.
    """

    costs: Float[Array | np.ndarray, "N"]
    prior: Float[Array | np.ndarray, "K"]


def measured(rule: GoodputNumDraft) -> Measured:
    """Returns the data of a rule, as NumPy arrays: they take less time than JAX arrays, in each call of `generate`."""
    prior = np.broadcast_to(np.asarray(rule.prior, np.float32), (rule.lengths[-1],))
    return Measured(np.asarray(rule.costs, np.float32), prior)


def without_data(rule: GoodputNumDraft) -> GoodputNumDraft:
    """Returns the part of a rule that is compiled in; costs and prior are the same for all rules of these lengths."""
    prior = (0.5,) * rule.lengths[-1] if isinstance(rule.prior, tuple) else 0.5
    return dataclasses.replace(rule, costs=(1.0,) * len(rule.costs), prior=prior)


class GoodputState(NamedTuple):
    """Observations and the present choice; the batch first, so that rows can be replaced. K is the longest length.

    A step of length 0 changes `probing` alone.

    Attributes:
      costs: Time of a step at each length.
      prior: Acceptance at each position before there are observations.
      tried: Steps that asked for a draft at each position and had accepted all before it; older ones count less.
      accepted: Those among them in which it was accepted.
      choice: Index of the chosen length.
      probing: Whether the next step probes the length after the chosen one.
      probe_at: Tokens of the text at which the next probe is due, or `NEVER`.
      num_failed: Probes since the last that raised the expected number of tokens, or since the choice changed.
      num_seen: Tokens of the text that are in the drafter's cache without a gap.
    """

    costs: Float[Array, "B N"]
    prior: Float[Array, "B K"]
    tried: Float[Array, "B K"]
    accepted: Float[Array, "B K"]
    choice: Int[Array, "B"]
    probing: Bool[Array, "B"]
    probe_at: Int[Array, "B"]
    num_failed: Int[Array, "B"]
    num_seen: Int[Array, "B"]


export.register_namedtuple_serialization(GoodputState, serialized_name="specsamp_jax.GoodputState")


def start(
    rule: GoodputNumDraft, data: Measured, lengths: Int[Array, "B"], remaining: Int[Array, "B"]
) -> tuple[Int[Array, "B"], GoodputState]:
    """Returns the draft length of each row's first step and the state before it."""
    batch_size, longest = lengths.shape[0], rule.lengths[-1]
    none = jnp.zeros((batch_size, longest), jnp.float32)
    costs, prior = jnp.asarray(data.costs), jnp.asarray(data.prior)
    acceptance = _acceptance(rule, none, none, prior)
    num_tokens = _num_tokens(acceptance, rule.lengths)
    slowest = _num_tokens_of_slowest(acceptance, rule.lengths, jnp.ones((batch_size,), bool), remaining)
    choice = jnp.argmax(slowest / costs).astype(jnp.int32)
    num_failed = jnp.zeros((batch_size,), jnp.int32)
    interval = _interval(rule, costs, num_tokens, choice, num_failed)
    state = GoodputState(
        costs=jnp.broadcast_to(costs, (batch_size, costs.shape[0])),
        prior=jnp.broadcast_to(prior, (batch_size, longest)),
        tried=none,
        accepted=none,
        choice=jnp.broadcast_to(choice, (batch_size,)),
        probing=jnp.zeros((batch_size,), bool),
        probe_at=_probe_at(lengths + interval, interval, lengths + remaining),
        num_failed=num_failed,
        num_seen=lengths,
    )
    return _per_row(rule, choice, remaining), state


def update(
    rule: GoodputNumDraft,
    length: int,
    state: GoodputState,
    *,
    active: Bool[Array, "B"],
    num_drafted: Int[Array, "B"],
    num_accepted: Int[Array, "B"],
    lengths: Int[Array, "B"],
    remaining: Int[Array, "B"],
) -> tuple[Int[Array, "B"], GoodputState]:
    """Returns the draft length of each row's next step and the state before it.

    Args:
      rule: The rule.
      length: The compiled length of the step. Without drafts there is nothing to observe.
      state: The state before the step.
      active: Rows that had not finished before the step.
      num_drafted: Drafts that were asked for.
      num_accepted: Drafts that were accepted.
      lengths: Tokens of each row after the step.
      remaining: Tokens from there to each row's limit.
    """
    if length > 0:
        counts = {"active": active, "num_drafted": num_drafted, "num_accepted": num_accepted}
        state = _observe(rule, state, **counts, lengths=lengths, remaining=remaining)
    choice = state.choice.max(initial=0)
    longer = jnp.minimum(choice + 1, len(rule.lengths) - 1)
    due = (active & (lengths >= state.probe_at)).any()
    probing = (longer > choice) & due & (rule.probe_share > 0)
    state = state._replace(probing=jnp.broadcast_to(probing, active.shape))
    return _per_row(rule, jnp.where(probing, longer, choice), remaining), state


def _observe(
    rule: GoodputNumDraft,
    state: GoodputState,
    *,
    active: Bool[Array, "B"],
    num_drafted: Int[Array, "B"],
    num_accepted: Int[Array, "B"],
    lengths: Int[Array, "B"],
    remaining: Int[Array, "B"],
) -> GoodputState:
    """The state with a step's counts, the choice that follows from them, and the text at which a probe is due."""
    position = jnp.arange(rule.lengths[-1])
    tried = active[:, None] & (position < num_drafted[:, None]) & (position <= num_accepted[:, None])
    accepted = tried & (position < num_accepted[:, None])
    keep = jnp.where(tried, 1 - 1 / rule.memory, 1.0)
    tried, accepted = tried.astype(jnp.float32), accepted.astype(jnp.float32)
    before = state
    state = state._replace(tried=state.tried * keep + tried, accepted=state.accepted * keep + accepted)

    costs, prior = state.costs.max(0, initial=0), state.prior.max(0, initial=0)
    expected = _num_tokens(_acceptance(rule, before.tried, before.accepted, prior), rule.lengths)
    acceptance = _acceptance(rule, state.tried, state.accepted, prior)
    num_tokens = _num_tokens(acceptance, rule.lengths)
    goodput = _num_tokens_of_slowest(acceptance, rule.lengths, active, remaining) / costs
    old, best = state.choice.max(initial=0), jnp.argmax(goodput).astype(jnp.int32)
    choice = jnp.where(goodput[best] > goodput[old] * (1 + rule.hysteresis), best, old)
    longer, probing, changed = jnp.minimum(old + 1, len(rule.lengths) - 1), state.probing.any(), choice != old
    raised = probing & (num_tokens[longer] > expected[longer])
    num_failed = jnp.where(changed | raised, 0, state.num_failed.max(initial=0) + probing.astype(jnp.int32))
    num_failed = jnp.broadcast_to(num_failed, active.shape)
    interval = _interval(rule, costs, num_tokens, choice, num_failed)
    latest = jnp.where(changed | probing, NEVER, state.probe_at)
    return state._replace(
        choice=jnp.broadcast_to(choice, active.shape),
        probe_at=_probe_at(jnp.minimum(latest, lengths + interval), interval, lengths + remaining),
        num_failed=num_failed,
        # The drafter reads its drafts as it draws them: all but the last two tokens are there, whatever was accepted.
        num_seen=jnp.where(state.probing, state.num_seen, lengths - 2),
    )


def _interval(
    rule: GoodputNumDraft,
    costs: Float[Array, "N"],
    num_tokens: Float[Array, "N"],
    choice: Int[Array, ""],
    num_failed: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Tokens of a row between two probes of the length after the chosen one."""
    longer = jnp.minimum(choice + 1, len(rule.lengths) - 1)
    loss = costs[longer] - costs[choice] * num_tokens[longer] / num_tokens[choice]
    # A drafter that did not run reads 32 tokens first, which takes about as long as another step of one draft.
    loss += jnp.where(jnp.array(rule.lengths)[choice] == 0, costs[longer] - costs[choice], 0)
    wait = loss / (max(rule.probe_share, 1e-6) * costs[choice])
    wait = jnp.maximum(wait, _SHORTEST_WAIT) * (1 << jnp.minimum(num_failed, _MOST_DOUBLINGS)).astype(jnp.float32)
    return (jnp.minimum(wait, _LONGEST_WAIT) * num_tokens[choice]).astype(jnp.int32)


def _probe_at(due: Int[Array, "B"], interval: Int[Array, "B"], limits: Int[Array, "B"]) -> Int[Array, "B"]:
    """`due`, or `NEVER` where fewer tokens than two intervals would follow: too few for a probe to pay."""
    return jnp.where(limits - due >= 2 * interval, due, NEVER)


def _per_row(rule: GoodputNumDraft, index: Int[Array, ""], remaining: Int[Array, "B"]) -> Int[Array, "B"]:
    """The length of that index, or less in rows that are close to their limit: the last token needs no draft."""
    return jnp.minimum(jnp.array(rule.lengths, jnp.int32)[index], jnp.maximum(remaining - 1, 0))


def _acceptance(
    rule: GoodputNumDraft, tried: Float[Array, "B K"], accepted: Float[Array, "B K"], prior: Float[Array, "K"]
) -> Float[Array, "K"]:
    """Acceptance at each position, given those before.

    A measured prior has a value per position. Otherwise the estimate of a position is the prior of the next.
    """
    tried, accepted = tried.sum(0), accepted.sum(0)
    if isinstance(rule.prior, tuple):
        return (accepted + _MEASURED_WEIGHT * prior) / (tried + _MEASURED_WEIGHT)
    rates = []
    for i in range(tried.shape[0]):
        before = rates[-1] if rates else prior[0]
        rates.append((accepted[i] + _ASSUMED_WEIGHT * before) / (tried[i] + _ASSUMED_WEIGHT))
    return jnp.stack(rates) if rates else jnp.zeros((0,), jnp.float32)


def _num_tokens(acceptance: Float[Array, "K"], lengths: tuple[int, ...]) -> Float[Array, "N"]:
    """The expected number of tokens of a step at each length."""
    sums = jnp.concatenate([jnp.ones(1), 1 + jnp.cumsum(jnp.cumprod(acceptance))])
    return sums[jnp.array(lengths)]


def _num_tokens_of_slowest(
    acceptance: Float[Array, "K"], lengths: tuple[int, ...], active: Bool[Array, "B"], remaining: Int[Array, "B"]
) -> Float[Array, "N"]:
    """The expected number of tokens per step, at each length, of the row that needs most steps to its limit."""
    mean = _num_tokens(acceptance, lengths)
    reached = jnp.cumprod(acceptance)  # P(at least i drafts are accepted)
    squares = jnp.cumsum((2 * jnp.arange(reached.shape[0], dtype=jnp.float32) + 1) * reached)
    variance = jnp.maximum(jnp.concatenate([jnp.zeros(1), squares])[jnp.array(lengths)] - (mean - 1) ** 2, 0)
    left = jnp.where(active, remaining, 0)
    num_rows = jnp.maximum((left > 0).sum(), 1).astype(jnp.float32)
    largest = ndtri((num_rows - 0.375) / (num_rows + 0.25))  # of as many normal draws, by Blom (1958)
    longest = left.max(initial=1).astype(jnp.float32)
    return mean / (1 + largest * jnp.sqrt(variance / (longest * mean)))
