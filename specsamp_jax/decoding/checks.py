"""Argument validation of the decoding loop that needs its drafters or models; see `specsamp_jax._checks`."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax._types import Model
from specsamp_jax.decoding import memory
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter, SamplingDrafter
from specsamp_jax.decoding.model_call import num_slots, vocab_size
from specsamp_jax.decoding.num_draft import NumDraft, compiled_lengths


def values(
    prompt: Any,
    prompt_lengths: Any,
    eos_token: Any,
    target: Model,
    drafter: Drafter | None,
    *,
    num_draft: NumDraft,
    max_new_tokens: int,
) -> None:
    """Ids in the target's vocabulary, parameters of the drafter in their range, and a text that memory can hold."""
    if isinstance(drafter, SamplingDrafter):
        drafter.check(prompt.shape[0])
    longest = compiled_lengths(num_draft)[-1]
    memory.check(prompt, models(target, drafter), max_new_tokens=max_new_tokens, longest_draft=longest)
    size = vocab_size(target, prompt.shape, num_slots(target, prompt.shape[1] + max_new_tokens, longest))
    _checks.prompt_ids(prompt, prompt_lengths, size)
    _checks.end_tokens(eos_token, size)


def models(target: Model, drafter: Drafter | None) -> list[Model]:
    """The models that run; a drafter of a user's own type may have more."""
    return [target, *([drafter.model] if isinstance(drafter, SamplingDrafter) else [])]


def widths(tokens: Int[Array, "B W"], log_probs: Float[Array, "B L"], longest_draft: int) -> None:
    """A state whose text can hold the longest draft after each row's limit."""
    num_columns = tokens.shape[1] - log_probs.shape[1]
    if num_columns != longest_draft:
        raise ValueError(
            f"state must have {longest_draft} columns in tokens [B, W] for drafts after those of log_probs [B, L]; got "
            f"{num_columns}, of W = {tokens.shape[1]} and L = {log_probs.shape[1]}. "
            "Was the state made by `init` with another `draft` or `num_draft`?"
        )


def draft_state(drafter: Drafter | None, state: Any, tokens: Int[Array, "B W"]) -> None:
    """A state of this drafter, by structure and shapes. That of a user's own type of drafter is not checked."""
    if isinstance(drafter, SamplingDrafter):
        expected = jax.eval_shape(lambda: drafter.model.init_cache_fn(*tokens.shape))
    elif drafter is None or isinstance(drafter, NGramDrafter):
        expected = ()
    else:
        return
    structure, found = jax.tree.structure(expected), jax.tree.structure(state)
    shapes, found_shapes = ([leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (expected, state))
    if structure != found or shapes != found_shapes:
        own, other = (structure, found) if structure != found else (shapes, found_shapes)
        raise ValueError(
            f"state.draft_state must be the drafter's own, {own}; got {other}. "
            "Was the state made by `init` with another `draft`?"
        )


def functions(verify_fn: Any, process_logits_fn: Any) -> None:
    """A rule, and a processor or None; a name is neither."""
    if not callable(verify_fn):
        raise ValueError(f"verify_fn must be a rule, such as specsamp_jax.verify_block; got {verify_fn!r}.")
    if process_logits_fn is not None and not callable(process_logits_fn):
        raise ValueError(
            "process_logits_fn must be None or callable as (tokens [B, L], lengths [B], logits [B, V]) -> logits; got "
            f"a {type(process_logits_fn).__name__}."
        )


def processed_logits(processed: Any, logits: Float[Array, "B V"]) -> None:
    """Logits of a `process_logits_fn`, of the shape that it was given: fewer would be another vocabulary."""
    _checks.floating("The result of process_logits_fn", processed)
    if processed.shape != logits.shape:
        raise ValueError(
            f"process_logits_fn must return logits of the shape that it was given, [B, V] = {list(logits.shape)}; got "
            f"{list(processed.shape)}."
        )
