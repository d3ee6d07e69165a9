"""Draft length of a step: a fixed number, or a rule that adapts it to the number of accepted drafts."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specsamp_jax import _checks
from specsamp_jax.decoding import first_choice, goodput, goodput_state
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.goodput_state import GoodputState, Measured, Rows
from specsamp_jax.decoding.state import DecodeState, StepInfo
from specsamp_jax.decoding.stats import by_position


@dataclasses.dataclass(frozen=True)
class HeuristicNumDraft:
    """The draft length of each row by the paper's heuristic: longer after full acceptance, else shorter.

    Each row starts at `initial`, adds `increase` after a step that accepted all its drafts and subtracts
    `decrease` otherwise, clipped to 1 and the largest of `lengths`. A step is compiled for each of `lengths`. Each step
    runs the smallest that is at least the draft length of every row; rows with a smaller one draft fewer tokens.

    Source: Wagner et al. (2024, arXiv 2406.11016, section 4), after Hugging Face's assisted generation.
    """

    initial: int = 5
    increase: int = 2
    decrease: int = 1
    lengths: tuple[int, ...] = (1, 3, 5, 8)

    def __post_init__(self):
        _checks.lengths("HeuristicNumDraft.lengths", self.lengths, 1)
        _checks.count("HeuristicNumDraft.initial", self.initial, 1)
        _checks.count("HeuristicNumDraft.increase", self.increase, 0)
        _checks.count("HeuristicNumDraft.decrease", self.decrease, 0)
        if not 1 <= self.initial <= self.lengths[-1]:
            raise ValueError(
                f"HeuristicNumDraft.initial must be from 1 to the largest of lengths, {self.lengths[-1]}; "
                f"got {self.initial}."
            )

    def update(self, num_draft: Int[Array, "B"], num_accepted: Int[Array, "B"]) -> Int[Array, "B"]:
        """The next draft length of each row."""
        longer = jnp.minimum(num_draft + self.increase, self.lengths[-1])
        return jnp.where(num_accepted >= num_draft, longer, jnp.maximum(num_draft - self.decrease, 1))


_MANY = 2**30  # steps: more than any text has

NumDraft = int | HeuristicNumDraft | GoodputNumDraft


def compiled_lengths(num_draft: NumDraft) -> tuple[int, ...]:
    """The draft lengths that a step is compiled for, ascending."""
    return (num_draft,) if isinstance(num_draft, int) else num_draft.lengths


def split(num_draft: NumDraft, batch_size: int, max_new_tokens: int) -> tuple[NumDraft, Measured | None]:
    """Returns the part of a rule that is compiled in, and that of `GoodputNumDraft` that is data."""
    if not isinstance(num_draft, GoodputNumDraft):
        return num_draft, None
    return first_choice.without_data(num_draft), first_choice.measured(num_draft, batch_size, max_new_tokens)


def start(
    num_draft: NumDraft, measured: Measured | None, lengths: Int[Array, "B"], max_new_tokens: int
) -> tuple[Int[Array, "B"], GoodputState | tuple[()]]:
    """Returns the draft length of each row's first step, and the state of the rule.

    Args:
      num_draft: The rule.
      measured: The data that `split` returned. None: that of `num_draft`.
      lengths: Tokens of each prompt.
      max_new_tokens: Tokens from there to each row's limit.
    """
    if isinstance(num_draft, GoodputNumDraft):
        data = measured or first_choice.measured(num_draft, lengths.shape[0], max_new_tokens)
        return goodput.start(num_draft, data, lengths)
    first = num_draft.initial if isinstance(num_draft, HeuristicNumDraft) else num_draft
    return jnp.full(lengths.shape, first, jnp.int32), ()


def update(
    num_draft: NumDraft, current: Int[Array, "B"], active: Bool[Array, "B"], num_accepted: Int[Array, "B"]
) -> Int[Array, "B"]:
    """Returns the draft length of each row's next step, after every step.

    `GoodputNumDraft` changes nothing here, which would take small kernels on a GPU after every step: `settle` does
    after several steps.
    """
    if isinstance(num_draft, HeuristicNumDraft):
        return jnp.where(active, num_draft.update(current, num_accepted), current)
    return current


def with_step(num_draft: NumDraft, state: DecodeState, info: StepInfo) -> DecodeState:
    """Returns the state with the counts of one more step, for `settle`."""
    if not isinstance(num_draft, GoodputNumDraft):
        return state
    rule = state.num_draft_state
    accepted = by_position(info.num_accepted, rule.num_accepted.shape[1])
    return with_counts(state, rule.num_emitted + info.num_tokens, rule.num_accepted + accepted)


def with_counts(state: DecodeState, num_emitted: Int[Array, "B"], num_accepted: Int[Array, "B K"]) -> DecodeState:
    """Returns the state of `GoodputNumDraft` with the counts since its last choice."""
    rule = state.num_draft_state._replace(num_emitted=num_emitted, num_accepted=num_accepted)
    return state._replace(num_draft_state=rule)


def settle(num_draft: NumDraft, state: DecodeState) -> DecodeState:
    """Returns the state with a new draft length if a choice is due. See `goodput.settle`."""
    if not isinstance(num_draft, GoodputNumDraft):
        return state
    next_num_draft, num_draft_state = goodput.settle(num_draft, state.num_draft_state, _rows(state))
    return state._replace(num_draft=next_num_draft, num_draft_state=num_draft_state)


def _rows(state: DecodeState) -> Rows:
    return Rows(~state.finished, state.lengths, state.limits - state.lengths)


def longest(state: DecodeState) -> Int[Array, ""]:
    """Returns the longest draft that a row of the next step asks for."""
    return jnp.where(state.finished, 0, state.num_draft).max(initial=0)


def next_index(num_draft: NumDraft, state: DecodeState) -> Int[Array, ""]:
    """Returns the index of the next step's length in `compiled_lengths`: the smallest that is enough for all rows."""
    needed = longest(state)
    # Comparisons of scalars are one kernel on a GPU, with what follows; a sum over an array is one of its own.
    return sum(((needed > length).astype(jnp.int32) for length in compiled_lengths(num_draft)[:-1]), jnp.int32(0))


def runs_next(num_draft: NumDraft, index: int, state: DecodeState) -> Bool[Array, ""]:
    """Whether the next step has the length of `index` again: the condition of a loop of steps of one length.

    Always with `GoodputNumDraft`: `most_steps` limits the steps of a loop, and none of them changes the draft length.
    """
    lengths = compiled_lengths(num_draft)
    if isinstance(num_draft, GoodputNumDraft):
        return jnp.bool_(True)
    needed = longest(state)
    return (needed <= lengths[index]) & (needed > (lengths[index - 1] if index else -1))


def most_steps(num_draft: NumDraft, index: int, state: DecodeState) -> Int[Array, ""] | int:
    """Returns the number of steps of the length of `index` before `settle` must be called."""
    if not isinstance(num_draft, GoodputNumDraft):
        return _MANY
    if compiled_lengths(num_draft)[index] > 0:
        return goodput_state.num_steps_to_choice(num_draft.lengths, state.num_draft_state)
    until_probe = goodput_state.num_steps_to_probe(num_draft.probe_share, state.num_draft_state, _rows(state))
    return jnp.minimum(until_probe, _MANY)
