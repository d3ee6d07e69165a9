"""Rates from the counts of a decoding loop."""

import numpy as np
from jaxtyping import Int


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
