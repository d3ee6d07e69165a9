"""Expected tokens of a step at each draft length, from the acceptance at each position."""

import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Float, Int

_ASSUMED_WEIGHT = 2.0  # observations that a prior of one number counts as
_MEASURED_WEIGHT = 50.0  # observations per row that a prior of one number per position counts as
_SHARED_WEIGHT = 100.0  # observations that the acceptance of all rows counts as in a row's: rows deviate by .05
_REACH, _POINTS = 3.0, 32  # half width of the integral in standard deviations, and its number of points


def acceptance(
    tried: Float[Array, "B K"], accepted: Float[Array, "B K"], prior: Float[Array, "K"], *, is_measured: bool
) -> Float[Array, "K"]:
    """Acceptance at each position, given that all drafts before it were accepted.

    A measured prior has a value per position. Otherwise the estimate at one position is the prior of the next position.
    """
    weight = _MEASURED_WEIGHT * tried.shape[0]
    tried, accepted = tried.sum(0), accepted.sum(0)
    if is_measured:
        return (accepted + weight * prior) / (tried + weight)
    rates = []
    for i in range(tried.shape[0]):
        before = rates[-1] if rates else prior[0]
        rates.append((accepted[i] + _ASSUMED_WEIGHT * before) / (tried[i] + _ASSUMED_WEIGHT))
    return jnp.stack(rates) if rates else jnp.zeros((0,), jnp.float32)


def num_tokens(rates: Float[Array, "*B K"], lengths: tuple[int, ...]) -> Float[Array, "N *B"]:
    """The expected number of tokens of a step at each length."""
    return _moments(rates, lengths)[0]


def _moments(
    rates: Float[Array, "*B K"], lengths: tuple[int, ...]
) -> tuple[Float[Array, "N *B"], Float[Array, "N *B"]]:
    """Mean and variance of the tokens of a step at each length, if positions are accepted independently."""
    reached = jnp.ones(rates.shape[:-1])
    mean, square = [reached], [jnp.zeros_like(reached)]
    # Single positions make one kernel on a GPU, a running product several.
    for i in range(rates.shape[-1]):
        reached *= rates[..., i]
        mean.append(mean[-1] + reached)
        square.append(square[-1] + (2 * i + 1) * reached)
    means, squares = (jnp.stack([each[length] for length in lengths]) for each in (mean, square))
    return means, jnp.maximum(squares - (means - 1) ** 2, 0)


def num_steps_of_slowest(
    tried: Float[Array, "B K"],
    accepted: Float[Array, "B K"],
    rates: Float[Array, "K"],
    lengths: tuple[int, ...],
    remaining: Int[Array, "B"],
) -> Float[Array, "N"]:
    """The expected number of steps, at each length, until the last row has its remaining tokens.

    The number of steps of a row is taken as normally distributed. The row's acceptance is shrunk to that of all rows,
    `rates`, and its uncertainty widens the distribution: without that, 16 rows of the trained pair would seem to need
    8 % fewer steps with four drafts than they do, and 3 % fewer with one. A single row needs its remaining tokens
    divided by the tokens per step.
    """
    if tried.shape[0] == 1:
        return remaining.astype(jnp.float32) / num_tokens(rates, lengths)
    # At most 1 in spite of rounding: the square root of own * (1 - own) is taken below.
    own = jnp.minimum((accepted + _SHARED_WEIGHT * rates) / (tried + _SHARED_WEIGHT), 1)
    per_step, variance = _moments(own, lengths)
    mean = remaining.astype(jnp.float32) / per_step
    # Rows differ as estimates from `_SHARED_WEIGHT` observations do, in the same direction at all positions of a row.
    unknown = jnp.sqrt(own * (1 - own) / (tried + _SHARED_WEIGHT))
    spread = mean * (_moments(jnp.minimum(own + unknown, 1), lengths)[0] / per_step - 1)
    deviation = jnp.sqrt(mean * variance / per_step**2 + spread**2)
    # The integral of the probability that a row is not finished, from nearly 1 to nearly 0.
    low, high = (mean - _REACH * deviation).max(-1, initial=0), (mean + _REACH * deviation).max(-1, initial=0)
    points = (jnp.arange(_POINTS, dtype=jnp.float32) + 0.5) / _POINTS
    steps = low + (high - low) * points[:, None]
    ready = ndtr((steps[..., None] - mean) / jnp.where(deviation > 0, deviation, 1))
    return low + (high - low) * (1 - ready.prod(-1)).mean(0)
