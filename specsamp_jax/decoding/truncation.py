"""Truncations that are not a cutoff of the logits: typical decoding and a smallest probability.

transformers applies them after temperature, top-k, top-p and min-p. As logits processors they come before, so they
compute with the temperature, and `Filters` applies the other three first. Forbidden tokens get -inf, the other logits
stay as they are, and greedy rows do too.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import SamplingParams
from specsamp_jax.decoding.processors import column, processor_type
from specsamp_jax.sampling.filters import make_filter
from specsamp_jax.sampling.reduce import wide


@processor_type()
class Filters:
    """Forbids the tokens that the filters of `sampling` leave out.

    Attributes:
      sampling: The temperature, which is not applied to the result, and the filters.
    """

    sampling: SamplingParams

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits without those tokens."""
        cutoff = make_filter(logits[:, None], self.sampling).cutoff
        if cutoff is None:
            return logits
        return jnp.where(wide(logits) >= cutoff, logits, -jnp.inf)


@processor_type()
class Typical:
    """Keeps the tokens whose -log p is nearest to the entropy, until they have the probability `mass`.

    Attributes:
      mass: From 0 to 1; 1 is off. A number, or `[B]`.
      temperature: Divides the logits first; not applied to the result. A number, or `[B]`.

    Source: Meister et al. (2022, arXiv 2202.00666), equation 9.
    """

    mass: ArrayLike
    temperature: ArrayLike = 1.0

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits without the other tokens."""
        log_probs, is_greedy = _log_probs(logits, self.temperature)
        probs = jnp.exp(log_probs)
        entropy = -jnp.where(probs > 0, probs * log_probs, 0).sum(-1, keepdims=True)
        distance = jnp.abs(-log_probs - entropy)
        order = jnp.argsort(distance, axis=-1)
        sums = jnp.cumsum(jnp.take_along_axis(probs, order, axis=-1), axis=-1)
        mass = column(self.mass, sums)
        # The token that reaches the mass is kept, and so are those as near to the entropy as it is.
        last = jnp.minimum((sums < mass).sum(-1, keepdims=True), sums.shape[-1] - 1)
        farthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, last, axis=-1), axis=-1)
        return jnp.where((distance <= farthest) | is_greedy | (mass >= 1), logits, -jnp.inf)


@processor_type()
class EpsilonCutoff:
    """Forbids tokens of a probability below `epsilon`, except the most probable.

    Attributes:
      epsilon: From 0 to 1; 0 is off. A number, or `[B]`.
      temperature: Divides the logits first; not applied to the result. A number, or `[B]`.

    Source: Hewitt et al. (2022, arXiv 2210.15191), section 4.
    """

    epsilon: ArrayLike
    temperature: ArrayLike = 1.0

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits without those tokens."""
        log_probs, is_greedy = _log_probs(logits, self.temperature)
        kept = jnp.exp(log_probs) >= column(self.epsilon, log_probs)
        is_largest = logits == logits.max(axis=-1, keepdims=True)
        return jnp.where(kept | is_largest | is_greedy, logits, -jnp.inf)


def _log_probs(logits: Float[Array, "B V"], temperature: ArrayLike) -> tuple[Float[Array, "B V"], Bool[Array, "B 1"]]:
    """Log p at that temperature, and whether a row is greedy; its log p is that of temperature 1."""
    logits = wide(logits)
    temperature = column(temperature, logits)
    is_greedy = temperature < float(jnp.finfo(logits.dtype).tiny)
    return jax.nn.log_softmax(logits / jnp.where(is_greedy, 1, temperature), axis=-1), is_greedy
