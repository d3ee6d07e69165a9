"""Expected tokens of a step at each draft length, from the acceptance at each position."""

import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Int

_ASSUMED_WEIGHT, _MEASURED_WEIGHT = 2.0, 20.0  # of a prior, in observations: one number, or one per position


def acceptance(
    tried: Float[Array, "B K"], accepted: Float[Array, "B K"], prior: Float[Array, "K"], *, is_measured: bool
) -> Float[Array, "K"]:
    """Acceptance at each position, given those before.

    A measured prior has a value per position. Otherwise the estimate of a position is the prior of the next.
    """
    tried, accepted = tried.sum(0), accepted.sum(0)
    if is_measured:
        return (accepted + _MEASURED_WEIGHT * prior) / (tried + _MEASURED_WEIGHT)
    rates = []
    for i in range(tried.shape[0]):
        before = rates[-1] if rates else prior[0]
        rates.append((accepted[i] + _ASSUMED_WEIGHT * before) / (tried[i] + _ASSUMED_WEIGHT))
    return jnp.stack(rates) if rates else jnp.zeros((0,), jnp.float32)


def num_tokens(rates: Float[Array, "K"], lengths: tuple[int, ...]) -> Float[Array, "N"]:
    """The expected number of tokens of a step at each length."""
    sums = [1 + jnp.zeros(())]
    for reached in _reached(rates):
        sums.append(sums[-1] + reached)
    return jnp.stack([sums[length] for length in lengths])


def _reached(rates: Float[Array, "K"]) -> list[Float[Array, ""]]:
    """P(at least i drafts are accepted), i from 1 on. Scalars make one kernel on a GPU, a running product several."""
    reached = [1 + jnp.zeros(())]
    for i in range(rates.shape[0]):
        reached.append(reached[-1] * rates[i])
    return reached[1:]


def num_tokens_of_slowest(
    rates: Float[Array, "K"], lengths: tuple[int, ...], unfinished: Bool[Array, "B"], remaining: Int[Array, "B"]
) -> Float[Array, "N"]:
    """The expected number of tokens per step, at each length, of the row that needs most steps to its limit."""
    mean = num_tokens(rates, lengths)
    squares = [jnp.zeros(())]
    for i, reached in enumerate(_reached(rates)):
        squares.append(squares[-1] + (2 * i + 1) * reached)
    variance = jnp.maximum(jnp.stack([squares[length] for length in lengths]) - (mean - 1) ** 2, 0)
    left = jnp.where(unfinished, remaining, 0)
    num_rows = jnp.maximum((left > 0).sum(), 1).astype(jnp.float32)
    largest = ndtri((num_rows - 0.375) / (num_rows + 0.25))  # of as many normal draws, by Blom (1958)
    longest = left.max(initial=1).astype(jnp.float32)
    return mean / (1 + largest * jnp.sqrt(variance / (longest * mean)))
