"""What Whisper's decoder may say next: rules on logits, each a `process_logits_fn` of `generate`.

They are frozen and hashable, so that equal ones need no new trace. Forbidden tokens get -inf.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.decoding.drafters import ProcessLogitsFn


@dataclasses.dataclass(frozen=True)
class SuppressTokens:
    """Forbids tokens everywhere.

    Attributes:
      forbidden: The tokens.
    """

    forbidden: tuple[int, ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits of what may follow."""
        return jnp.where(_among(self.forbidden, logits), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class SuppressAtBegin:
    """Forbids tokens as the first behind the prompt: Whisper's blank and its end.

    Attributes:
      forbidden: The tokens.
      begin: Tokens of the prompt.
    """

    forbidden: tuple[int, ...]
    begin: int

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits of what may follow."""
        return jnp.where(_among(self.forbidden, logits) & (lengths == self.begin)[:, None], -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class TimestampRules:
    """Timestamps come first, in pairs within the text, and never go back.

    - The first token is a timestamp, of at most `max_initial` steps.
    - After a timestamp behind text comes another timestamp, or the end; after two timestamps (or the first) comes
      text, or the end.
    - A timestamp is later than the one before; the second of a pair may be the same.
    - Where all timestamps together are more probable than each single token of text, a timestamp comes.

    Attributes:
      begin: Tokens of the prompt.
      end_token: The end of a text; the tokens below it are those of text.
      first_timestamp: The token of 0.00 s; those above it are the later ones. The one below it says that there are
        no timestamps, and is forbidden.
      max_initial: The latest first timestamp, in steps behind 0.00 s. None: any.

    Source: Radford et al. (2022, arXiv 2212.04356), section 3.8 and the rules in its published code; what they
    forbid is what `WhisperTimeStampLogitsProcessor` of transformers forbids.
    """

    begin: int
    end_token: int
    first_timestamp: int
    max_initial: int | None = None

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits of what may follow."""
        first = self.first_timestamp
        index = jnp.arange(tokens.shape[1])
        generated = (index >= self.begin) & (index < lengths[:, None])
        latest = jnp.where(generated & (tokens >= first), index, -1).max(axis=1)
        latest_stamp = _at(tokens, latest)
        num_generated = lengths - self.begin
        behind_stamp = (num_generated >= 1) & (latest == lengths - 1)
        behind_pair = behind_stamp & ((num_generated < 2) | (_at(tokens, lengths - 2) >= first))
        opens_pair = behind_stamp & ~behind_pair
        earliest = jnp.where(latest < 0, first, latest_stamp + jnp.where(opens_pair, 0, 1))

        token = jnp.arange(logits.shape[1])
        is_stamp = token >= first
        forbidden = (
            (token == first - 1)
            | (is_stamp & (behind_pair[:, None] | (token < earliest[:, None])))
            | ((token < self.end_token) & opens_pair[:, None])
        )
        not_initial = ~is_stamp if self.max_initial is None else ~is_stamp | (token > first + self.max_initial)
        forbidden |= not_initial & (num_generated == 0)[:, None]
        logits = jnp.where(forbidden, -jnp.inf, logits)

        stamps = jax.nn.logsumexp(jnp.where(is_stamp, logits, -jnp.inf), axis=1, keepdims=True)
        best_text = jnp.where(is_stamp, -jnp.inf, logits).max(axis=1, keepdims=True)
        return jnp.where(~is_stamp & (stamps > best_text), -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class Rules:
    """Several rules, one after the other.

    Attributes:
      rules: The rules.
    """

    rules: tuple[ProcessLogitsFn, ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits of what may follow."""
        for rule in self.rules:
            logits = rule(tokens, lengths, logits)
        return logits


def _among(forbidden: Sequence[int], logits: Float[Array, "B V"]) -> Bool[np.ndarray, "V"]:
    return np.isin(np.arange(logits.shape[1]), forbidden)


def _at(tokens: Int[Array, "B L"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    """Each row's token at an index; the first one's where the index is below 0."""
    return jnp.take_along_axis(tokens, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]
