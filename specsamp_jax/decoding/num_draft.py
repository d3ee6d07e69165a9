"""Draft length of a step: a fixed number, or a rule that adapts it to the number of accepted drafts."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from specsamp_jax import _checks


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
        if not isinstance(self.lengths, tuple):
            raise ValueError(
                f"HeuristicNumDraft.lengths must be a tuple, because each length is compiled; got {self.lengths!r}."
            )
        for length in self.lengths:
            _checks.count("Each of HeuristicNumDraft.lengths", length, 1)
        _checks.count("HeuristicNumDraft.initial", self.initial, 1)
        _checks.count("HeuristicNumDraft.increase", self.increase, 0)
        _checks.count("HeuristicNumDraft.decrease", self.decrease, 0)
        ascending = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        if not self.lengths or not ascending:
            raise ValueError(f"HeuristicNumDraft.lengths must be ascending and at least 1; got {self.lengths}.")
        if not 1 <= self.initial <= self.lengths[-1]:
            raise ValueError(
                f"HeuristicNumDraft.initial must be from 1 to the largest of lengths, {self.lengths[-1]}; "
                f"got {self.initial}."
            )

    def update(self, num_draft: Int[Array, "B"], num_accepted: Int[Array, "B"]) -> Int[Array, "B"]:
        """The next draft length of each row."""
        longer = jnp.minimum(num_draft + self.increase, self.lengths[-1])
        return jnp.where(num_accepted >= num_draft, longer, jnp.maximum(num_draft - self.decrease, 1))


NumDraft = int | HeuristicNumDraft


def compiled_lengths(num_draft: NumDraft) -> tuple[int, ...]:
    """The draft lengths that a step is compiled for, ascending."""
    return num_draft.lengths if isinstance(num_draft, HeuristicNumDraft) else (num_draft,)


def initial(num_draft: NumDraft) -> int:
    """The draft length of the first step."""
    return num_draft.initial if isinstance(num_draft, HeuristicNumDraft) else num_draft


def update(num_draft: NumDraft, current: Int[Array, "B"], num_accepted: Int[Array, "B"]) -> Int[Array, "B"]:
    """The draft length of each row's next step."""
    return num_draft.update(current, num_accepted) if isinstance(num_draft, HeuristicNumDraft) else current
