"""Who proposes tokens: a smaller model, or the n-grams of the text so far."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, Draft, Model, SamplingParams
from specsamp_jax.decoding.model_call import apply, prefill
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.draw import sample

ProcessLogitsFn = Callable[[Int[Array, "B L"], Int[Array, "B"], Float[Array, "B V"]], Float[Array, "B V"]]
"""`(tokens [B, L], lengths [B], logits [B, V]) -> logits [B, V]`: the text so far, and logits of what follows."""


@runtime_checkable
class Drafter(Protocol):
    """Whoever can propose: `generate` takes any object with these two methods that is a pytree."""

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """The drafter's state after it has seen the prompts; tokens are 0 where a row has none."""
        ...

    def propose(
        self,
        key: Key[Array, "B"],
        state: Any,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, "B"],
        *,
        num_draft: int,
        sampling: SamplingParams,
        process_logits_fn: ProcessLogitsFn,
    ) -> tuple[Draft, Any]:
        """Proposes `num_draft` tokens a row to follow its first `lengths` tokens, and the state after it."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter:
    """Drafts with a smaller model, token by token.

    Attributes:
      model: The model; its vocabulary is the target's.
      sampling: What is applied to its logits. None: what is applied to the target's.
    """

    model: Model
    sampling: SamplingParams | None = None

    def check(self, batch_size: int) -> None:
        """Raises ValueError where a parameter is out of its range."""
        if self.sampling is not None:
            _checks.sampling("draft.sampling", self.sampling, batch_size)

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """The model's cache, filled with the prompts."""
        return prefill(self.model, tokens, max_length)

    def propose(
        self,
        key: Key[Array, "B"],
        state: Any,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, "B"],
        *,
        num_draft: int,
        sampling: SamplingParams,
        process_logits_fn: ProcessLogitsFn,
    ) -> tuple[Draft, Any]:
        """`num_draft` tokens sampled one after the other, with the logits they were sampled from."""
        params = sampling if self.sampling is None else self.sampling
        model = self.model

        def draw(logits, tokens, index):
            return draw_next(key, index, logits, tokens, lengths, params, process_logits_fn)

        logits, cache = first_logits(model, state, tokens, lengths)
        token, first_row, first_normalizer, tokens = draw(logits, tokens, 0)

        def next_draft(carry, index):
            cache, token, tokens = carry
            logits, cache = apply(model, token[:, None], lengths[:, None] + index - 1, cache)
            token, logits, log_normalizer, tokens = draw(logits[:, 0], tokens, index)
            return (cache, token, tokens), (token, logits, log_normalizer)

        (cache, _, _), rest = lax.scan(next_draft, (cache, token, tokens), jnp.arange(1, num_draft))
        drafted, logits, log_normalizers = (
            jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], axis=1)
            for first, later in zip((token, first_row, first_normalizer), rest, strict=True)
        )
        return Draft(drafted, logits, params, log_normalizers), cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NGramDrafter:
    """Drafts what followed the last occurrence of the text's last tokens: prompt lookup, without a model.

    The longest n-gram that occurs before is used, and of its occurrences the last. Where the text ends before
    enough tokens have followed it, the text is taken to go on repeating itself.

    Attributes:
      max_ngram: The longest n-gram that is looked for.
      min_ngram: The shortest.

    Source: Saxena (2023), prompt lookup decoding.
    """

    max_ngram: int = dataclasses.field(default=3, metadata={"static": True})
    min_ngram: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self):
        _checks.count("NGramDrafter.min_ngram", self.min_ngram, 1)
        _checks.count("NGramDrafter.max_ngram", self.max_ngram, 1)
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                "NGramDrafter needs 1 <= min_ngram <= max_ngram; "
                f"got min_ngram = {self.min_ngram}, max_ngram = {self.max_ngram}."
            )

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """Nothing: the text is all there is."""
        return ()

    def propose(
        self,
        key: Key[Array, "B"],
        state: Any,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, "B"],
        *,
        num_draft: int,
        sampling: SamplingParams,
        process_logits_fn: ProcessLogitsFn,
    ) -> tuple[Draft, Any]:
        """`num_draft` tokens without chance, or none where no n-gram of the right length occurs before."""
        follows = jnp.full(lengths.shape, -1, jnp.int32)
        for size in range(self.min_ngram, self.max_ngram + 1):
            found = _last_occurrence(tokens, lengths, size)
            follows = jnp.where(found >= 0, found, follows)
        period = jnp.maximum(lengths - follows, 1)
        index = follows[:, None] + jnp.arange(num_draft) % period[:, None]
        drafted = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
        return Draft(jnp.where(follows[:, None] >= 0, drafted, PAD_TOKEN)), state


def _last_occurrence(tokens: Int[Array, "B W"], lengths: Int[Array, "B"], size: int) -> Int[Array, "B"]:
    """Where the text goes on after the last earlier occurrence of its own last `size` tokens; -1 without."""
    width = tokens.shape[1]
    matches = jnp.ones(tokens.shape, bool)
    for offset in range(size):
        wanted = jnp.take_along_axis(tokens, jnp.maximum(lengths - size + offset, 0)[:, None], axis=1)
        matches &= jnp.roll(tokens, -offset, axis=1) == wanted
    after = jnp.arange(width, dtype=jnp.int32) + size
    return jnp.where(matches & (after < lengths[:, None]), after, -1).max(axis=1)


def first_logits(
    model: Model, cache: Any, tokens: Int[Array, "B W"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Any]:
    """Logits of the first draft, and the cache after it.

    The model reads each row's last two tokens: the last draft of a step that was accepted whole was never fed.
    """
    expected = jax.eval_shape(lambda: model.init_cache_fn(*tokens.shape))
    _checks.draft_state(expected, cache)
    positions = jnp.maximum(lengths[:, None] - jnp.array([2, 1]), 0)
    logits, cache = apply(model, jnp.take_along_axis(tokens, positions, 1), positions, cache)
    return logits[:, -1], cache


def draw_next(
    key: Key[Array, "B"],
    index: Int[Array, ""] | int,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B W"],
    lengths: Int[Array, "B"],
    sampling: SamplingParams,
    process_logits_fn: ProcessLogitsFn,
) -> tuple[Int[Array, "B"], Float[Array, "B V"], Float[Array, "B"], Int[Array, "B W"]]:
    """Draft number `index`, its processed logits and their normalizer, and the text with it."""
    lengths_now = lengths + index
    logits = process_logits_fn(tokens, lengths_now, logits)
    token, log_normalizer = sample(streams.fold_in(key, index), logits, sampling)
    return token, logits, log_normalizer, append(tokens, lengths_now, token[:, None])


def append(tokens: Array, lengths: Int[Array, "B"], new: Array, num_new: Int[Array, "B"] | int | None = None) -> Array:
    """The buffer with the first `num_new` (or all) of the new entries of each row written behind its length."""
    offset = jnp.arange(new.shape[1])
    index = lengths[:, None] + offset
    if num_new is not None:
        index = jnp.where(offset < jnp.reshape(num_new, (-1, 1)), index, tokens.shape[1])
    return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(
        tokens, index, new.astype(tokens.dtype)
    )
