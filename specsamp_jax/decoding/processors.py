"""Logits processors: the generation settings of published checkpoints that change a distribution.

Each is a function `(tokens [B, L], lengths [B], logits [B, V]) -> logits [B, V]`, to be passed to `generate` as
`process_logits_fn`, which applies it to target and draft alike at every drafted position. Forbidden tokens get -inf.
Each equals the processor of the same setting in the transformers library. A processor is a pytree: its arrays and
numbers may change without a new trace. Penalties are computed in float32 at least, and return it: two logits of 16 bits
that a penalty moves by less than a rounding would become equal.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax.decoding.drafters import ProcessLogitsFn
from specsamp_jax.sampling.reduce import wide


def processor_type(*static: str) -> Callable[[type], type]:
    """Registers a frozen dataclass whose fields, but for the `static` ones, are the leaves of a pytree."""

    def register(cls: type) -> type:
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [field.name for field in dataclasses.fields(cls) if field.name not in static]

        def flatten(processor):
            values = vars(processor)
            leaves = [(jax.tree_util.GetAttrKey(name), values[name]) for name in data]
            return leaves, tuple(values[name] for name in static)

        def unflatten(fixed, leaves):
            # Not by the constructor: JAX puts other things than arrays in place of leaves while it lowers a program.
            processor = object.__new__(cls)
            vars(processor).update(zip((*data, *static), (*leaves, *fixed), strict=True))
            return processor

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register


@processor_type()
class RepetitionPenalty:
    """Divides positive logits of tokens that occur in the text by `penalty`, and multiplies negative ones by it.

    Attributes:
      penalty: Above 1 discourages repetition; 1 is off. A number, or `[B]`.

    Source: Keskar et al. (2019, arXiv 1909.05858), section 4.1.
    """

    penalty: ArrayLike

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the penalised logits."""
        logits = wide(logits)
        penalty = column(self.penalty, logits)
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        return jnp.where(_counts(tokens, 0, lengths, logits.shape[1]) > 0, penalised, logits)


@processor_type()
class CountPenalty:
    """Lowers the logits of generated tokens: once by `presence`, and by `frequency` for each occurrence.

    Attributes:
      presence: Subtracted if a token was generated. A number, or `[B]`.
      frequency: Subtracted for each time a token was generated. A number, or `[B]`.
      prompt_lengths: Tokens of each prompt, which do not count. A number, or `[B]`.
    """

    presence: ArrayLike
    frequency: ArrayLike
    prompt_lengths: ArrayLike

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the penalised logits."""
        logits = wide(logits)
        counts = _counts(tokens, self.prompt_lengths, lengths, logits.shape[1])
        presence, frequency = column(self.presence, logits), column(self.frequency, logits)
        return logits - presence * (counts > 0) - frequency * counts.astype(logits.dtype)


@processor_type("size")
class NoRepeatNGram:
    """Forbids every token that would complete an n-gram that occurs in the text.

    Attributes:
      size: n, the number of tokens of an n-gram, 1 or more.

    Source: Paulus et al. (2017, arXiv 1705.04304), section 2.5.
    """

    size: int

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits with repeated n-grams forbidden."""
        num_before = self.size - 1
        position = jnp.arange(tokens.shape[1])
        repeats = (position >= num_before) & (position < lengths[:, None]) & (lengths >= num_before)[:, None]
        for back in range(1, num_before + 1):
            latest = token_at(tokens, lengths - back)
            repeats &= jnp.roll(tokens, back, axis=1) == latest[:, None]
        return jnp.where(_scatter(repeats, tokens, logits.shape[1]), -jnp.inf, logits)


@processor_type("sequences")
class ForbidSequences:
    """Forbids the last token of each sequence wherever the text ends with the tokens before it (bad words).

    Attributes:
      sequences: Sequences of one token or more.
    """

    sequences: tuple[tuple[int, ...], ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits with the ends of such sequences forbidden."""
        # All sequences of one length are compared at once: published lists have hundreds.
        for size in sorted({len(sequence) for sequence in self.sequences}):
            sequences = np.array([sequence for sequence in self.sequences if len(sequence) == size], np.int32)
            matches = jnp.broadcast_to((lengths >= size - 1)[:, None], (len(lengths), len(sequences)))
            for back in range(1, size):
                matches &= token_at(tokens, lengths - back)[:, None] == sequences[:, -1 - back]
            logits = logits.at[:, sequences[:, -1]].min(jnp.where(matches, -jnp.inf, jnp.inf).astype(logits.dtype))
        return logits


@processor_type("forbidden")
class SuppressTokens:
    """Forbids tokens everywhere.

    Attributes:
      forbidden: The tokens.
    """

    forbidden: tuple[int, ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits without those tokens."""
        return jnp.where(is_among(self.forbidden, logits), -jnp.inf, logits)


@processor_type("forbidden")
class SuppressBefore:
    """Forbids tokens until the text is `length` tokens long, prompt included.

    With end tokens as `forbidden` it sets the minimum length of a text. With `length` one more than the prompt's, it
    forbids tokens as the first of a text.

    Attributes:
      forbidden: The tokens.
      length: Text length from which on the tokens are allowed. A number, or `[B]`.
    """

    forbidden: tuple[int, ...]
    length: ArrayLike

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits without those tokens where the text is still short."""
        is_short = (lengths < jnp.asarray(self.length))[:, None]
        return jnp.where(is_among(self.forbidden, logits) & is_short, -jnp.inf, logits)


@processor_type("token")
class ForceToken:
    """Gives all probability to one token where the text is `length` tokens long (a forced first or last token).

    Attributes:
      token: The token.
      length: The length of the text, prompt included, that the token follows. A number, or `[B]`.
    """

    token: int
    length: ArrayLike

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns 0 for the token and -inf for the others at that length, else the logits."""
        forced = jnp.where(jnp.arange(logits.shape[1]) == self.token, 0.0, -jnp.inf).astype(logits.dtype)
        return jnp.where((lengths == jnp.asarray(self.length))[:, None], forced, logits)


@processor_type()
class Chain:
    """Applies processors one after the other.

    Attributes:
      processors: The processors, the first one first.

    Example:
      >>> import jax.numpy as jnp
      >>> process = Chain((RepetitionPenalty(2.0), SuppressTokens((3,))))
      >>> process(jnp.array([[1, 0]]), jnp.array([1]), jnp.array([[4.0, 4.0, -1.0, 9.0]])).tolist()
      [[4.0, 2.0, -1.0, -inf]]
    """

    processors: tuple[ProcessLogitsFn, ...]

    def __call__(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], logits: Float[Array, "B V"]
    ) -> Float[Array, "B V"]:
        """Returns the logits after all processors."""
        return functools.reduce(lambda out, process: process(tokens, lengths, out), self.processors, logits)


def column(value: ArrayLike, logits: Float[Array, "B V"]) -> Float[Array, "B 1"]:
    """A number, or one per row, as a column that broadcasts against the logits."""
    return jnp.broadcast_to(jnp.asarray(value, logits.dtype), logits.shape[:1])[:, None]


def is_among(tokens: tuple[int, ...], logits: Float[Array, "B V"]) -> Bool[np.ndarray, "V"]:
    """True at the vocabulary entries that are among these tokens."""
    return np.isin(np.arange(logits.shape[1]), tokens)


def token_at(tokens: Int[Array, "B L"], index: Int[Array, "B"]) -> Int[Array, "B"]:
    """Each row's token at an index; the first one's where the index is below 0."""
    return jnp.take_along_axis(tokens, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]


def _counts(
    tokens: Int[Array, "B L"], first: ArrayLike, lengths: Int[Array, "B"], vocab_size: int
) -> Int[Array, "B V"]:
    """Occurrences of each token in each row's text from `first` on."""
    position = jnp.arange(tokens.shape[1])
    first = jnp.broadcast_to(jnp.asarray(first), lengths.shape)[:, None]
    counted = (position >= first) & (position < lengths[:, None])
    rows = jnp.arange(tokens.shape[0])[:, None]
    # Ids outside the vocabulary, such as padding, are dropped.
    index = jnp.where(counted & (tokens >= 0), tokens, vocab_size)
    return jnp.zeros((tokens.shape[0], vocab_size), jnp.int32).at[rows, index].add(1, mode="drop")


def _scatter(mask: Bool[Array, "B L"], tokens: Int[Array, "B L"], vocab_size: int) -> Bool[Array, "B V"]:
    """True at each vocabulary entry that occurs in its row at a position where `mask` is True."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    index = jnp.where(mask & (tokens >= 0), tokens, vocab_size)
    return jnp.zeros((tokens.shape[0], vocab_size), bool).at[rows, index].set(True, mode="drop")
