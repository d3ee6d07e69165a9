"""Expected tokens of a step at each draft length, from the acceptance at each position.

All functions take NumPy arrays too, and then compute with NumPy: the first choice of a text is made on the host.
"""

import math
from typing import Any

import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Float, Int

_ASSUMED_WEIGHT = 2.0  # observations that a prior of one number counts as
_MEASURED_WEIGHT = 50.0  # observations per row that a prior of one number per position counts as
_SHARED_WEIGHT = 100.0  # observations that the acceptance of all rows counts as in a row's: rows deviate by .05
_REACH, _POINTS = 3.0, 32  # half width of the integral in standard deviations, and its number of points


def acceptance(
    tried: Float[Any, "B K"], accepted: Float[Any, "B K"], prior: Float[Any, "K"], *, is_measured: bool
) -> Float[Any, "K"]:
    """Acceptance at each position, given that all drafts before it were accepted.

    A measured prior has a value per position. Otherwise the estimate at one position is the prior of the next position.
    """
    weight = _MEASURED_WEIGHT * tried.shape[0]
    tried, accepted = tried.sum(0), accepted.sum(0)
    xp = prior.__array_namespace__()
    if is_measured:
        return (accepted + weight * prior) / (tried + weight)
    rates = []
    for i in range(tried.shape[0]):
        before = rates[-1] if rates else prior[0]
        rates.append((accepted[i] + _ASSUMED_WEIGHT * before) / (tried[i] + _ASSUMED_WEIGHT))
    return xp.stack(rates) if rates else xp.zeros((0,), xp.float32)


def estimates(
    lengths: tuple[int, ...],
    costs: Float[Any, "N"],
    prior: Float[Any, "K"],
    tried: Float[Any, "B K"],
    accepted: Float[Any, "B K"],
    remaining: Int[Any, "B"],
    *,
    is_measured: bool,
) -> tuple[Float[Any, "N"], Float[Any, "N"]]:
    """Expected tokens of a step at each length, and the time until the last row has its remaining tokens."""
    rates = acceptance(tried, accepted, prior, is_measured=is_measured)
    return num_tokens(rates, lengths), num_steps_of_slowest(tried, accepted, rates, lengths, remaining) * costs


def num_tokens(rates: Float[Any, "*B K"], lengths: tuple[int, ...]) -> Float[Any, "N *B"]:
    """The expected number of tokens of a step at each length."""
    return _moments(rates, lengths)[0]


def _moments(rates: Float[Any, "*B K"], lengths: tuple[int, ...]) -> tuple[Float[Any, "N *B"], Float[Any, "N *B"]]:
    """Mean and variance of the tokens of a step at each length, if positions are accepted independently."""
    xp = rates.__array_namespace__()
    reached = xp.ones(rates.shape[:-1], xp.float32)
    mean, square = [reached], [xp.zeros_like(reached)]
    # Single positions make one kernel on a GPU, a running product several.
    for i in range(rates.shape[-1]):
        reached = reached * rates[..., i]
        mean.append(mean[-1] + reached)
        square.append(square[-1] + (2 * i + 1) * reached)
    means, squares = (xp.stack([each[length] for length in lengths]) for each in (mean, square))
    return means, xp.maximum(squares - (means - 1) ** 2, 0)


def num_steps_of_slowest(
    tried: Float[Any, "B K"],
    accepted: Float[Any, "B K"],
    rates: Float[Any, "K"],
    lengths: tuple[int, ...],
    remaining: Int[Any, "B"],
) -> Float[Any, "N"]:
    """The expected number of steps, at each length, until the last row has its remaining tokens.

    The number of steps of a row is taken as normally distributed. The row's acceptance is shrunk to that of all rows,
    `rates`, and its uncertainty widens the distribution: without that, 16 rows of the trained pair would seem to need
    8 % fewer steps with four drafts than they do, and 3 % fewer with one. A single row needs its remaining tokens
    divided by the tokens per step.
    """
    xp = rates.__array_namespace__()
    if tried.shape[0] == 1:
        return remaining.astype(xp.float32) / num_tokens(rates, lengths)
    # At most 1 in spite of rounding: the square root of own * (1 - own) is taken below.
    own = xp.minimum((accepted + _SHARED_WEIGHT * rates) / (tried + _SHARED_WEIGHT), 1)
    per_step, variance = _moments(own, lengths)
    mean = remaining.astype(xp.float32) / per_step
    # Rows differ as estimates from `_SHARED_WEIGHT` observations do, in the same direction at all positions of a row.
    unknown = xp.sqrt(own * (1 - own) / (tried + _SHARED_WEIGHT))
    spread = mean * (_moments(xp.minimum(own + unknown, 1), lengths)[0] / per_step - 1)
    deviation = xp.sqrt(mean * variance / per_step**2 + spread**2)
    # The integral of the probability that a row is not finished, from nearly 1 to nearly 0.
    low, high = (mean - _REACH * deviation).max(-1, initial=0), (mean + _REACH * deviation).max(-1, initial=0)
    points = (xp.arange(_POINTS, dtype=xp.float32) + 0.5) / _POINTS
    steps = low + (high - low) * points[:, None]
    ready = _normal_cdf((steps[..., None] - mean) / xp.where(deviation > 0, deviation, 1))
    return low + (high - low) * (1 - ready.prod(-1)).mean(0)


def _normal_cdf(deviations: Float[Any, "*S"]) -> Float[Any, "*S"]:
    """Probability that a standard normal variable is at most each of `deviations`."""
    if isinstance(deviations, np.ndarray):
        erf = np.vectorize(math.erf, otypes=[np.float32])
        return (1 + erf(deviations / math.sqrt(2))) / 2
    return ndtr(deviations)
