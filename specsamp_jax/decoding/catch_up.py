"""Feeds a drafter the tokens that it missed while the target decoded alone, before it drafts again."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from specsamp_jax.decoding.drafters import Drafter, ReadsText
from specsamp_jax.decoding.goodput_state import GoodputState
from specsamp_jax.decoding.num_draft import longest
from specsamp_jax.decoding.state import DecodeState
from specsamp_jax.sampling.mesh_axes import same_axes

CATCH_UP = 32
"""Tokens that a drafter reads per call if it was not run for some steps."""


def start_drafter(
    drafter: Drafter | None,
    prompt: Int[Array, "B P"],
    max_length: int,
    *,
    num_draft: Int[Array, "B"],
    num_draft_state: Any,
) -> tuple[Any, Any]:
    """Returns the drafter's state before the first step, and that of the rule for the draft length.

    A drafter that can catch up reads the prompts now only if the first step drafts; `num_draft` is the draft length of
    that step.
    """
    if drafter is None:
        return (), num_draft_state
    if not isinstance(num_draft_state, GoodputState) or not isinstance(drafter, ReadsText):
        return drafter.init(prompt, max_length), num_draft_state
    drafts = num_draft.max(initial=0) > 0
    init_fn, empty_fn = same_axes(
        lambda: drafter.init(prompt, max_length), lambda: drafter.empty(prompt.shape[0], max_length)
    )
    # A loop of at most one step. XLA puts a conditional into a CUDA graph, after which a GPU was idle for .5 ms.
    _, draft_state = lax.while_loop(
        lambda carry: carry[0], lambda carry: (jnp.zeros_like(carry[0]), init_fn()), (drafts, empty_fn())
    )
    return draft_state, num_draft_state._replace(num_seen=jnp.where(drafts, num_draft_state.num_seen, 0))


def catch_up(state: DecodeState, drafter: Drafter | None) -> DecodeState:
    """Returns the state with the missing tokens in the drafter's cache if the next step drafts, else `state`.

    `propose` reads the last two tokens of each row itself. Before a probe the drafter reads at most the last
    `CATCH_UP` tokens, so that the cost of a probe is bounded; it reads the earlier ones before the next step that
    drafts and is no probe.
    """
    if not (isinstance(state.num_draft_state, GoodputState) and isinstance(drafter, ReadsText)):
        return state
    rule, width = state.num_draft_state, _width(state)
    first, end = _missing(state)
    drafts = longest(state) > 0

    def behind(carry):
        return drafts & (carry[0] < end).any()

    def read(carry):
        first, draft_state = carry
        # Consecutive positions inside the text, or from 0 on if it is shorter than the window.
        begin = jnp.clip(first, 0, jnp.maximum(state.lengths - width, 0))
        positions = begin[:, None] + jnp.arange(width)
        tokens = jnp.maximum(jnp.take_along_axis(state.tokens, positions, axis=1), 0)
        return begin + width, drafter.read(draft_state, tokens, positions)

    _, draft_state = lax.while_loop(behind, read, (first, state.draft_state))
    num_seen = jnp.where(drafts & (first <= rule.num_seen), jnp.maximum(end, rule.num_seen), rule.num_seen)
    return state._replace(draft_state=draft_state, num_draft_state=rule._replace(num_seen=num_seen))


def is_behind(state: DecodeState) -> Bool[Array, ""]:
    """Whether the next step drafts and the drafter misses tokens; requires `may_miss_tokens`."""
    first, end = _missing(state)
    return (longest(state) > 0) & (first < end).any()


def may_miss_tokens(state: DecodeState, drafter: Drafter | None) -> bool:
    """Whether some steps may leave out a drafter with a cache, so that it misses their tokens."""
    return isinstance(state.num_draft_state, GoodputState) and isinstance(drafter, ReadsText)


def _width(state: DecodeState) -> int:
    return min(CATCH_UP, state.tokens.shape[1])


def _missing(state: DecodeState) -> tuple[Int[Array, "B"], Int[Array, "B"]]:
    """Start and end of the range of each row's tokens that the drafter must read."""
    rule, end = state.num_draft_state, state.lengths - 2
    first = jnp.where(rule.probing, jnp.maximum(rule.num_seen, state.lengths - _width(state)), rule.num_seen)
    return jnp.where(state.finished, end, first), end
