"""Argument validation of the decoding loop that needs its drafters or models; see `specsamp_jax._checks`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax._types import Draft, Model, Verification
from specsamp_jax.decoding import memory
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter, SamplingDrafter
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.goodput_state import GoodputState
from specsamp_jax.decoding.model_call import num_slots, vocab_size
from specsamp_jax.decoding.num_draft import HeuristicNumDraft, NumDraft, compiled_lengths
from specsamp_jax.decoding.state import DecodeState
from specsamp_jax.sampling import mesh_axes


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
    """Checks that ids are in the target's vocabulary and that memory can hold the text."""
    longest = compiled_lengths(num_draft)[-1]
    memory.check(prompt, models(target, drafter), max_new_tokens=max_new_tokens, longest_draft=longest)
    size = vocab_size(target, prompt.shape, num_slots(target, prompt.shape[1] + max_new_tokens, longest))
    _checks.prompt_ids(prompt, prompt_lengths, size)
    _checks.end_tokens(eos_token, size)


def automatic_axes(**arrays: Any) -> None:
    """Checks that arrays are not sharded over explicit mesh axes, over which the loop's operations are ambiguous."""
    for name, array in arrays.items():
        axes = mesh_axes.explicit_axes(jax.typeof(array).sharding.mesh) if isinstance(array, jax.Array) else ()
        if axes:
            raise ValueError(
                f"{name} must not be sharded over explicit mesh axes; got axes {', '.join(axes)}. Make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto, ...), or use jax.shard_map over the batch."
            )


def loop(target: Any, draft: Any, num_draft: Any) -> None:
    """Checks the types of target, drafter and draft length."""
    if not isinstance(target, Model):
        raise ValueError(f"target must be a Model; got {type(target).__name__}. See specsamp_jax.models for adapters.")
    if isinstance(draft, type) or not (draft is None or isinstance(draft, Model) or hasattr(draft, "propose")):
        raise ValueError(f"draft must be a Model, a drafter with `propose`, or None; got {type(draft).__name__}.")
    if isinstance(num_draft, HeuristicNumDraft | GoodputNumDraft):
        return
    if not isinstance(num_draft, int) or isinstance(num_draft, bool):
        raise ValueError(
            "num_draft must be a Python int, HeuristicNumDraft or GoodputNumDraft, for it sets shapes; got "
            f"{num_draft!r}."
        )
    _checks.count("num_draft", num_draft, 0)


def drafter(drafter: Drafter | None, batch_size: _checks.Size) -> None:
    """Checks that the drafter's parameters are in their range."""
    if isinstance(drafter, SamplingDrafter):
        drafter.check(batch_size)


def models(target: Model, drafter: Drafter | None) -> list[Model]:
    """The models whose memory is counted: the target's, and that of a drafter of this package."""
    return [target, *([drafter.model] if isinstance(drafter, SamplingDrafter) else [])]


def state(state: Any) -> None:
    """Checks that a state is a `DecodeState`."""
    if not isinstance(state, DecodeState):
        raise ValueError(f"state must be a DecodeState, as init returns it; got a {type(state).__name__}.")


def widths(tokens: Int[Array, "B W"], log_probs: Float[Array, "B L"], longest_draft: int) -> None:
    """Checks that the text of a state can hold the longest draft after each row's limit."""
    num_columns = tokens.shape[1] - log_probs.shape[1]
    if num_columns != longest_draft:
        raise ValueError(
            f"state must have {longest_draft} columns in tokens [B, W] for drafts after those of log_probs [B, L]; got "
            f"{num_columns}, of W = {tokens.shape[1]} and L = {log_probs.shape[1]}. "
            "Was the state made by `init` with another `draft` or `num_draft`?"
        )


def draft_state(drafter: Drafter | None, state: Any, tokens: Int[Array, "B W"]) -> None:
    """Checks structure and shapes of a drafter's state. That of a user's own type of drafter is not checked."""
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


def num_draft_state(num_draft: NumDraft, state: Any) -> None:
    """Checks that a state is that of this rule for the draft length; only `GoodputNumDraft` has one."""
    num_costs = len(num_draft.lengths) + 1 if isinstance(num_draft, GoodputNumDraft) else 0
    found = state.costs.shape[1] if isinstance(state, GoodputState) else 0
    if found != num_costs:
        raise ValueError(
            f"state.num_draft_state must be that of num_draft, {num_draft!r}; got a {type(state).__name__}. "
            "Was the state made by `init` with another `num_draft`?"
        )


def functions(verify_fn: Any, process_logits_fn: Any) -> None:
    """Checks that the rule is callable, and that the processor is callable or None."""
    if not callable(verify_fn):
        raise ValueError(f"verify_fn must be a rule, such as specsamp_jax.verify_block; got {verify_fn!r}.")
    if process_logits_fn is not None and not callable(process_logits_fn):
        raise ValueError(
            "process_logits_fn must be None or callable as (tokens [B, L], lengths [B], logits [B, V]) -> logits; got "
            f"a {type(process_logits_fn).__name__}."
        )


def processed_logits(processed: Any, logits: Float[Array, "B V"]) -> None:
    """Checks dtype and shape of the logits that a `process_logits_fn` returned for `logits`."""
    _checks.floating("The result of process_logits_fn", processed)
    if processed.shape != logits.shape:
        raise ValueError(
            f"process_logits_fn must return logits of the shape that it was given, [B, V] = {list(logits.shape)}; got "
            f"{list(processed.shape)}."
        )


def proposal(result: Any, batch_size: _checks.Size, num_draft: int) -> None:
    """Checks that `propose` of a drafter returned `(Draft, state)` with tokens `[B, num_draft]`."""
    if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], Draft):
        raise ValueError(f"propose of the drafter must return (Draft, state); got a {type(result).__name__}.")
    tokens = result[0].tokens
    _checks.integers("tokens of the proposed Draft", tokens)
    if tokens.shape != (batch_size, num_draft):
        raise ValueError(
            f"tokens of the proposed Draft must have shape [B, num_draft] = [{batch_size}, {num_draft}]; got "
            f"{list(tokens.shape)}. A row with fewer drafts ends with -1."
        )


def stateful(results: Any) -> None:
    """Checks that a rule with `init` returned `(Verification, state)`."""
    # A Verification is a tuple too, but not of two.
    if not isinstance(results, tuple) or len(results) != 2:
        raise ValueError(
            f"verify_fn must return (Verification, state), because it has `init`; got a {type(results).__name__}."
        )


def verification(result: Any, logits: Float[Array, "B K1 V"]) -> None:
    """Checks that a `verify_fn` returned a `Verification` with tokens `[B, K + 1]`."""
    if not isinstance(result, Verification):
        raise ValueError(
            f"verify_fn must return a Verification; got a {type(result).__name__}. "
            "A rule that has `init` returns (Verification, state)."
        )
    if jnp.shape(result.tokens) != logits.shape[:2]:
        raise ValueError(
            f"verify_fn must return tokens of shape [B, K+1] = {list(logits.shape[:2])}; got "
            f"{list(jnp.shape(result.tokens))}."
        )
