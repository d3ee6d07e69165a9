"""State of the decoding loop between steps, and the results of one step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int


class DecodeState(NamedTuple):
    """State between steps. L is P + `max_new_tokens`.

    W = L + the longest draft length, because a step may draft beyond a row's limit.

    Attributes:
      tokens: The text of each row, then `PAD_TOKEN`.
      lengths: Tokens of each row so far.
      limits: Maximum length of each row.
      finished: True for rows that have an end token or have reached their limit.
      log_probs: log p of generated tokens, 0 elsewhere.
      num_draft: Draft length of each row in the next step.
      target_cache: The target's cache.
      draft_state: The drafter's state.
      num_draft_state: The state of the rule for the draft length; () if it has none.
      verify_state: The state of the verification rule; () if it has none.
    """

    tokens: Int[Array, "B W"]
    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    finished: Bool[Array, "B"]
    log_probs: Float[Array, "B L"]
    num_draft: Int[Array, "B"]
    target_cache: Any
    draft_state: Any
    num_draft_state: Any = ()
    verify_state: Any = ()


class StepInfo(NamedTuple):
    """Tokens and counts of one step.

    Attributes:
      tokens: The new tokens of each row, then `PAD_TOKEN`; none in rows that were finished before.
      num_tokens: Number of new tokens of each row.
      num_drafted: Drafts that were verified, 0 in rows that were finished before. Drafts after an end token or the
        limit are in neither count.
      num_accepted: Drafts that were accepted, 0 in rows that were finished before.
      status: As in `Verification`.
    """

    tokens: Int[Array, "B K1"]
    num_tokens: Int[Array, "B"]
    num_drafted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    status: Int[Array, "B"]


for _type in (DecodeState, StepInfo):
    export.register_namedtuple_serialization(_type, serialized_name=f"specsamp_jax.{_type.__name__}")


def with_own_buffers(state: DecodeState, *inputs: Any) -> DecodeState:
    """Copies arrays of the state that are inputs or occur twice, so that a step may donate the state."""
    seen = {id(leaf) for leaf in jax.tree.leaves(inputs)}

    def own(leaf):
        shared = id(leaf) in seen and not isinstance(leaf, Tracer)
        seen.add(id(leaf))
        return jnp.copy(leaf) if shared else leaf

    return jax.tree.map(own, state)
