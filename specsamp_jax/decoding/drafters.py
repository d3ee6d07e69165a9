"""Drafters: a smaller model, or the n-grams of the text so far."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, CoupledNoise, Draft, Model, SamplingParams
from specsamp_jax.decoding.model_call import apply, prefill
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.draw import sample
from specsamp_jax.sampling.gumbel import sample_coupled
from specsamp_jax.sampling.rows import take_row

ProcessLogitsFn = Callable[[Int[Array, "B L"], Int[Array, "B"], Float[Array, "B V"]], Float[Array, "B V"]]
"""`(tokens [B, L], lengths [B], logits [B, V]) -> logits [B, V]`: the text so far, and the logits of its next token."""


SampleFn = Callable[..., tuple[Int[Array, "B"], Float[Array, "B"]]]
"""`(key, index, positions, logits, sampling) -> (tokens, log_normalizers)`: samples draft `index` of a step."""


@runtime_checkable
class Drafter(Protocol):
    """Protocol of drafters: `generate` accepts any pytree with these two methods."""

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """Returns the drafter's state after the prompts; `tokens` are 0 past the length of a row's prompt."""
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
        """Returns a `Draft` of `num_draft` tokens per row, to follow its first `lengths` tokens, and the next state."""
        ...


@runtime_checkable
class ReadsText(Protocol):
    """Protocol of drafters with a cache: `read` fills it if the drafter was not run in some steps.

    Only `GoodputNumDraft` has such steps. If its first step drafts nothing, the drafter starts from `empty` and reads
    the prompts when they are needed. Without these methods a drafter reads all prompts with `init`, and its cache keeps
    gaps later; its drafts are then worse, and the text still exact.
    """

    def empty(self, batch_size: int, max_length: int) -> Any:
        """Returns the state before the first token, of the shapes of `init`."""
        ...

    def read(self, state: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Any:
        """Returns the state after these tokens, at consecutive positions; the last may lie after the text."""
        ...


@runtime_checkable
class DraftsCoupled(Protocol):
    """Protocol of drafters that can draw with the noise of `verify_coupled`.

    `generate` calls `propose_coupled` in place of `propose` with a rule that takes `positions`. Drafts of any drafter
    leave the text of `verify_coupled` as it is; those drawn with its noise are accepted more often.
    """

    def propose_coupled(
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
        """Like `propose`, with draws of `sample_coupled`; `key` is the same in all steps of a text."""
        ...


class SamplingDrafter:
    """Base of the drafters that sample from a `model`; they differ in `_propose`, which takes a `SampleFn` first."""

    model: Model
    sampling: SamplingParams | None

    def check(self, batch_size: int) -> None:
        """Raises ValueError if a parameter is out of its range."""
        if self.sampling is not None:
            _checks.sampling("draft.sampling", self.sampling, batch_size)

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """The model's cache, filled with the prompts."""
        return prefill(self.model, tokens, max_length)

    def empty(self, batch_size: int, max_length: int) -> Any:
        """The model's cache before it has seen a token."""
        return self.model.init_cache_fn(batch_size, max_length)

    def read(self, state: Any, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]) -> Any:
        """The cache after these tokens."""
        return apply(self.model, tokens, positions, state)[1]

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
        """Samples at most `num_draft` tokens per row one by one, and keeps the logits they were sampled from."""
        options = {"num_draft": num_draft, "sampling": sampling, "process_logits_fn": process_logits_fn}
        return self._propose(sample_independent, key, state, tokens, lengths, **options)

    def propose_coupled(
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
        """Like `propose`, with draws of `sample_coupled`; `key` is the same in all steps of a text."""
        options = {"num_draft": num_draft, "sampling": sampling, "process_logits_fn": process_logits_fn}
        proposal, state = self._propose(sample_at_position, key, state, tokens, lengths, **options)
        return proposal._replace(noise=CoupledNoise()), state

    def _propose(
        self, sample_fn: SampleFn, key, state, tokens, lengths, *, num_draft, sampling, process_logits_fn
    ) -> tuple[Draft, Any]:
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelDrafter(SamplingDrafter):
    """Drafts with a smaller model, token by token.

    Attributes:
      model: The model; its vocabulary is the target's.
      sampling: Temperature and filters for the model's logits. None: those of the target.
    """

    model: Model
    sampling: SamplingParams | None = None

    def _propose(
        self, sample_fn: SampleFn, key, state, tokens, lengths, *, num_draft, sampling, process_logits_fn
    ) -> tuple[Draft, Any]:
        params = sampling if self.sampling is None else self.sampling
        model = self.model

        def draw(logits, tokens, index):
            return draw_next(sample_fn, key, index, logits, tokens, lengths, params, process_logits_fn)

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
    """Drafts the tokens that followed the last earlier occurrence of the text's last tokens (prompt lookup), no model.

    Uses the longest n-gram at the end of the text that occurs earlier too, and its last earlier occurrence. If fewer
    than `num_draft` tokens follow that, the draft repeats them.

    Attributes:
      max_ngram: Largest n of the n-grams.
      min_ngram: Smallest n.

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
        """Returns (), because the text is the only state."""
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
        """Proposes `num_draft` tokens deterministically, or none in rows without an earlier occurrence."""
        follows = jnp.full(lengths.shape, -1, jnp.int32)
        for size in range(self.min_ngram, self.max_ngram + 1):
            found = _last_occurrence(tokens, lengths, size)
            follows = jnp.where(found >= 0, found, follows)
        period = jnp.maximum(lengths - follows, 1)
        index = follows[:, None] + jnp.arange(num_draft) % period[:, None]
        drafted = jnp.take_along_axis(tokens, jnp.maximum(index, 0), axis=1)
        return Draft(jnp.where(follows[:, None] >= 0, drafted, PAD_TOKEN)), state


def _last_occurrence(tokens: Int[Array, "B W"], lengths: Int[Array, "B"], size: int) -> Int[Array, "B"]:
    """Index of the token after the last earlier occurrence of the text's last `size` tokens; -1 if there is none."""
    width = tokens.shape[1]
    matches = jnp.ones(tokens.shape, bool)
    for offset in range(size):
        wanted = take_row(tokens, jnp.maximum(lengths - size + offset, 0))[:, None]
        matches &= jnp.roll(tokens, -offset, axis=1) == wanted
    after = jnp.arange(width, dtype=jnp.int32) + size
    return jnp.where(matches & (after < lengths[:, None]), after, -1).max(axis=1)


def first_logits(
    model: Model, cache: Any, tokens: Int[Array, "B W"], lengths: Int[Array, "B"]
) -> tuple[Float[Array, "B V"], Any]:
    """Logits of the first draft, and the cache after that call.

    The model reads each row's last two tokens: if a step accepts all its drafts, the last of them is not in the cache.
    """
    positions = jnp.maximum(lengths[:, None] - jnp.array([2, 1]), 0)
    logits, cache = apply(model, jnp.take_along_axis(tokens, positions, 1), positions, cache)
    return logits[:, -1], cache


def sample_independent(
    key: Key[Array, "B"],
    index: Int[Array, ""] | int,
    positions: Int[Array, "B"],
    logits: Float[Array, "B V"],
    sampling: SamplingParams,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples draft `index` of a step whose key no other step has."""
    return sample(streams.fold_in(key, index), logits, sampling)


def sample_at_position(
    key: Key[Array, "B"],
    index: Int[Array, ""] | int,
    positions: Int[Array, "B"],
    logits: Float[Array, "B V"],
    sampling: SamplingParams,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples the token at `positions` of each row's text, with the noise of `verify_coupled`."""
    return sample_coupled(key, logits, sampling, positions=positions)


def draw_next(
    sample_fn: SampleFn,
    key: Key[Array, "B"],
    index: Int[Array, ""] | int,
    logits: Float[Array, "B V"],
    tokens: Int[Array, "B W"],
    lengths: Int[Array, "B"],
    sampling: SamplingParams,
    process_logits_fn: ProcessLogitsFn,
) -> tuple[Int[Array, "B"], Float[Array, "B V"], Float[Array, "B"], Int[Array, "B W"]]:
    """Samples draft `index`; returns the token, its processed logits, their logsumexp, and the text with the token."""
    lengths_now = lengths + index
    logits = process_logits_fn(tokens, lengths_now, logits)
    token, log_normalizer = sample_fn(key, index, lengths_now, logits, sampling)
    return token, logits, log_normalizer, append(tokens, lengths_now, token[:, None])


def append(tokens: Array, lengths: Int[Array, "B"], new: Array, num_new: Int[Array, "B"] | int | None = None) -> Array:
    """Writes the first `num_new` (None: all) of each row's new entries into the buffer, starting at its length."""
    offset = jnp.arange(new.shape[1])
    index = lengths[:, None] + offset
    if num_new is not None:
        index = jnp.where(offset < jnp.reshape(num_new, (-1, 1)), index, tokens.shape[1])
    return jax.vmap(lambda row, at, values: row.at[at].set(values, mode="drop"))(
        tokens, index, new.astype(tokens.dtype)
    )
