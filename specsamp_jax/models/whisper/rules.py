"""Rules on the logits of Whisper's decoder, each a `process_logits_fn` of `generate`.

A rule sets the logits of the tokens that it forbids to -inf. Rules are frozen and hashable, so that equal rules need no
new trace.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specsamp_jax.decoding.drafters import ProcessLogitsFn
from specsamp_jax.decoding.processors import is_among, token_at


@dataclasses.dataclass(frozen=True)
class SuppressAtBegin:
    """Forbids tokens as the first after the prompt: Whisper's blank and end tokens.

    Attributes:
      forbidden: The tokens.
      begin: The length of the prompt.
    """

    forbidden: tuple[int, ...]
    begin: int

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits, -inf at forbidden tokens."""
        return jnp.where(is_among(self.forbidden, logits) & (lengths == self.begin)[:, None], -jnp.inf, logits)


@dataclasses.dataclass(frozen=True)
class TimestampRules:
    """Forces a timestamp at the start, timestamps in pairs within the text, and times that never decrease.

    - The first token is a timestamp of at most `max_initial` steps.
    - A timestamp that follows text is followed by another timestamp or the end; two timestamps (or the first one) are
      followed by text or the end.
    - A timestamp is later than the one before it; the second of a pair may be equal.
    - If all timestamps together are more probable than the most probable token of text, a timestamp follows.

    Attributes:
      begin: The length of the prompt.
      end_token: The end of a text; the tokens below it are text.
      first_timestamp: The token of 0.00 s; the tokens above it are later times. The token below it stands for "no
        timestamps" and is forbidden.
      max_initial: The latest first timestamp, in steps after 0.00 s. None: any.

    Source: Radford et al. (2022, arXiv 2212.04356), section 3.8, and its published code. The forbidden tokens are those
    of `WhisperTimeStampLogitsProcessor` in transformers.
    """

    begin: int
    end_token: int
    first_timestamp: int
    max_initial: int | None = None

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits, -inf at forbidden tokens."""
        first = self.first_timestamp
        index = jnp.arange(tokens.shape[1])
        generated = (index >= self.begin) & (index < lengths[:, None])
        latest = jnp.where(generated & (tokens >= first), index, -1).max(axis=1)
        latest_stamp = token_at(tokens, latest)
        num_generated = lengths - self.begin
        after_stamp = (num_generated >= 1) & (latest == lengths - 1)
        after_pair = after_stamp & ((num_generated < 2) | (token_at(tokens, lengths - 2) >= first))
        opens_pair = after_stamp & ~after_pair
        earliest = jnp.where(latest < 0, first, latest_stamp + jnp.where(opens_pair, 0, 1))

        token = jnp.arange(logits.shape[1])
        is_stamp = token >= first
        forbidden = (
            (token == first - 1)
            | (is_stamp & (after_pair[:, None] | (token < earliest[:, None])))
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
    """Applies several rules in order.

    Attributes:
      rules: The rules.
    """

    rules: tuple[ProcessLogitsFn, ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits, -inf at forbidden tokens."""
        for rule in self.rules:
            logits = rule(tokens, lengths, logits)
        return logits
