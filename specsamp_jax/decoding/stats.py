"""Counts of a decoding loop, and rates from them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from specsamp_jax._types import Stats
from specsamp_jax.decoding.state import StepInfo


class Counts(NamedTuple):
    """Counts of a decoding loop by row; in `Stats` those by position are sums over rows. K is the longest draft length.

    They are also the observations of `GoodputNumDraft`.

    Attributes:
      num_steps: Steps of the loop.
      num_emitted: Tokens emitted by each row.
      num_drafted: Drafts verified at each position; see `Stats`.
      num_accepted: Drafts accepted at each position.
      status: As in `Stats`.
    """

    num_steps: Int[Array, ""]
    num_emitted: Int[Array, "B"]
    num_drafted: Int[Array, "B K"]
    num_accepted: Int[Array, "B K"]
    status: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch_size: int, num_draft: int) -> "Counts":
        """Returns the counts before the first step, for B rows and K draft positions."""
        by_position = (batch_size, num_draft)
        return cls(*(jnp.zeros(shape, jnp.int32) for shape in ((), batch_size, by_position, by_position, batch_size)))


def by_position(num_drafts: Int[Array, "B"], longest: int) -> Int[Array, "B K"]:
    """1 at the positions of each row's first `num_drafts` drafts, 0 after them."""
    return (jnp.arange(longest) < num_drafts[:, None]).astype(jnp.int32)


def after_step(counts: Counts, info: StepInfo) -> Counts:
    """Returns the counts with those of one more step."""
    longest = counts.num_drafted.shape[1]
    return Counts(
        counts.num_steps + 1,
        counts.num_emitted + info.num_tokens,
        counts.num_drafted + by_position(info.num_drafted, longest),
        counts.num_accepted + by_position(info.num_accepted, longest),
        counts.status | info.status,
    )


def over_rows(counts: Counts) -> Stats:
    """Returns the counts that a `Generation` has."""
    num_drafted, num_accepted = (each.sum(0, dtype=jnp.int32) for each in (counts.num_drafted, counts.num_accepted))
    return Stats(counts.num_steps, counts.num_emitted, num_drafted, num_accepted, counts.status)


def drafts_in_text(
    num_drafted: Int[Array, "B"], num_accepted: Int[Array, "B"], num_new: Int[Array, "B"]
) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Returns how many of a step's drafts were made for the text, and how many of those were accepted.

    A draft after an end token, or beyond a limit, could not become part of the text, whatever the rule said of it.

    Args:
      num_drafted: Drafts that were verified.
      num_accepted: Drafts that were accepted.
      num_new: Tokens that each row kept.
    """
    return jnp.where(num_new <= num_accepted, num_new, num_drafted), jnp.minimum(num_accepted, num_new)


def accepted_by_position(num_drafted: Int[np.ndarray, "K"], num_accepted: Int[np.ndarray, "K"]) -> list[float]:
    """Returns the share of drafts accepted at each position, given that all drafts before it were accepted.

    A position counts as reached in a step if a token was drafted there and the draft before it was accepted. If the
    draft length varies, the counts bound the number of times a position was reached from above only, so the share is a
    lower bound. It is 0 for a position that was never reached.

    Args:
      num_drafted: `Stats.num_drafted`, or a sum of several.
      num_accepted: `Stats.num_accepted`, or a sum of several.

    Example:
      >>> accepted_by_position(np.array([10, 10]), np.array([8, 4]))
      [0.8, 0.5]
    """
    reached = np.minimum(num_drafted, np.concatenate([num_drafted[:1], num_accepted[:-1]]))
    return (num_accepted / np.maximum(reached, 1)).tolist()
