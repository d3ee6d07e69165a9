"""Counts of a decoding loop, and rates from them."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int


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
