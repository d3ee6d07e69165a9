"""One step of decoding with a draft length that is compiled in."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, Draft, KeyLike, Model, SamplingParams
from specsamp_jax.decoding import checks
from specsamp_jax.decoding import num_draft as num_draft_module
from specsamp_jax.decoding.drafters import Drafter, ProcessLogitsFn, append
from specsamp_jax.decoding.keys import step_keys
from specsamp_jax.decoding.model_call import apply
from specsamp_jax.decoding.num_draft import NumDraft
from specsamp_jax.decoding.state import DecodeState, StepInfo
from specsamp_jax.decoding.stateful_rule import VerifyFn, apply_rule
from specsamp_jax.decoding.stats import drafts_in_text
from specsamp_jax.sampling.rows import take_row


def step_of_length(
    length: int,
    state: DecodeState,
    *,
    key: KeyLike,
    target: Model,
    drafter: Drafter | None,
    num_draft: NumDraft,
    sampling: SamplingParams,
    eos_token: int | Sequence[int] | Int[Array, "E"] | None,
    verify_fn: VerifyFn,
    process_logits_fn: ProcessLogitsFn | None,
) -> tuple[DecodeState, StepInfo]:
    """Runs one step that drafts `length` tokens, or fewer in rows whose `state.num_draft` is less.

    The drafter's cache must hold the text; see `catch_up`. `StepInfo.tokens` has the width of the longest draft length.
    `num_draft.settle` follows: `GoodputNumDraft` observes steps from their counts.
    """
    batch_size = state.tokens.shape[0]
    keys = step_keys(key, state.lengths, drafter, verify_fn)
    buffer_length = state.log_probs.shape[1]

    def process(tokens, lengths, logits):
        if process_logits_fn is None:
            return logits
        length = jnp.minimum(lengths, buffer_length)
        text = jnp.where(jnp.arange(buffer_length) < length[:, None], tokens[:, :buffer_length], PAD_TOKEN)
        processed = process_logits_fn(text, length, logits)
        checks.processed_logits(processed, logits)
        return processed

    proposal, draft_state = Draft(jnp.zeros((batch_size, 0), jnp.int32)), state.draft_state
    if keys.propose_fn is not None and length > 0:
        proposed = keys.propose_fn(
            keys.draft,
            state.draft_state,
            state.tokens,
            state.lengths,
            num_draft=length,
            sampling=sampling,
            process_logits_fn=process,
        )
        checks.proposal(proposed, batch_size, length)
        proposal, draft_state = proposed
    wanted = jnp.arange(length) < state.num_draft[:, None]
    proposal = proposal._replace(tokens=jnp.where(wanted, proposal.tokens, PAD_TOKEN))
    last = take_row(state.tokens, state.lengths - 1)[:, None]
    fed = jnp.concatenate([last, jnp.maximum(proposal.tokens, 0)], axis=1)
    positions = state.lengths[:, None] - 1 + jnp.arange(length + 1)
    logits, target_cache = apply(target, fed, positions, state.target_cache)
    _checks.end_tokens(eos_token, logits.shape[-1])
    if process_logits_fn is not None:
        text = append(state.tokens, state.lengths, proposal.tokens)
        drafts = jnp.arange(length + 1)
        logits = jax.vmap(lambda i, row: process(text, state.lengths + i, row), (0, 1), 1)(drafts, logits)
    result, verify_state = apply_rule(
        verify_fn,
        keys.verify,
        logits,
        proposal,
        sampling,
        options=keys.verify_options,
        state=state.verify_state,
        finished=state.finished,
    )
    num_drafted = jnp.cumprod(proposal.tokens >= 0, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)

    num_new, ended = _cut(result.tokens, result.num_accepted + 1, state, eos_token)
    active = ~state.finished
    lengths = state.lengths + num_new
    new_state = DecodeState(
        tokens=append(state.tokens, state.lengths, result.tokens, num_new),
        lengths=lengths,
        limits=state.limits,
        finished=state.finished | ended,
        log_probs=append(state.log_probs, state.lengths, result.log_probs, num_new),
        num_draft=num_draft_module.update(num_draft, state.num_draft, active, result.num_accepted),
        target_cache=target_cache,
        draft_state=draft_state,
        num_draft_state=state.num_draft_state,
        verify_state=verify_state,
    )
    gained = jnp.where(jnp.arange(length + 1) < num_new[:, None], result.tokens, PAD_TOKEN)
    missing = num_draft_module.compiled_lengths(num_draft)[-1] - length
    gained = jnp.pad(gained, ((0, 0), (0, missing)), constant_values=PAD_TOKEN)
    # Constants without drafts, so that the loop's counts by position are not changed: a kernel per step on a GPU.
    none = jnp.zeros((batch_size,), jnp.int32)
    kept = drafts_in_text(num_drafted, result.num_accepted, num_new) if length else (none, none)
    counted = (jnp.where(active, count, 0) for count in (*kept, result.status))
    return new_state, StepInfo(gained, num_new, *counted)


def eos_tokens(eos_token: int | Sequence[int] | Int[Array, "E"] | None) -> Int[Array, "E"]:
    """All end tokens as one array, empty for None."""
    return jnp.ravel(jnp.asarray(() if eos_token is None else eos_token, jnp.int32))


def _cut(
    tokens: Int[Array, "B K1"],
    num_emitted: Int[Array, "B"],
    state: DecodeState,
    eos_token: int | Sequence[int] | Int[Array, "E"] | None,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Number of emitted tokens that each row keeps, and whether the row ends with them.

    A row ends with its first end token, or at its limit; a finished row keeps none.
    """
    position = jnp.arange(tokens.shape[1])
    num_new = jnp.minimum(num_emitted, state.limits - state.lengths)
    ends = eos_tokens(eos_token)
    # An array without elements is not read: XLA of JAX 0.11.2 ends the process if an input of `shard_map` is one.
    is_eos = (tokens[..., None] == ends).any(-1) if ends.size else jnp.zeros(tokens.shape, bool)
    is_eos &= position < num_new[:, None]
    num_new = jnp.where(is_eos.any(1), jnp.argmax(is_eos, axis=1).astype(num_new.dtype) + 1, num_new)
    ended = is_eos.any(1) | (state.lengths + num_new >= state.limits)
    return jnp.where(state.finished, 0, num_new), ended
