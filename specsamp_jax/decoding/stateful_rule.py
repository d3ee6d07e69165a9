"""Verification rules in the decoding loop: functions without a state, and rules that carry one per row."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from specsamp_jax._types import Draft, SamplingParams, Verification
from specsamp_jax.decoding import checks


@runtime_checkable
class StatefulRule(Protocol):
    """Protocol of verification rules that keep a state per row, for `verify_fn` of `generate` and `step`."""

    def init(self, batch_size: int) -> Any:
        """Returns the state before the first step: arrays with the batch first."""
        ...

    def __call__(
        self,
        key: Key[Array, "B"],
        target_logits: Float[Array, "B K1 V"],
        draft: Draft,
        sampling: SamplingParams | None,
        state: Any,
    ) -> tuple[Verification, Any]:
        """Returns the verification of a step, and the state after it; finished rows keep theirs."""
        ...


VerifyFn = Callable[..., Verification] | StatefulRule


def start_rule(verify_fn: VerifyFn, batch_size: int) -> Any:
    """Returns the state of a rule before the first step, () for a function."""
    return verify_fn.init(batch_size) if isinstance(verify_fn, StatefulRule) else ()


def apply_rule(
    verify_fn: VerifyFn,
    keys: Key[Array, "B"],
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams,
    *,
    options: dict[str, Any],
    state: Any,
    finished: Bool[Array, "B"],
) -> tuple[Verification, Any]:
    """Returns the verification of a step, and the state of the rule after it: finished rows keep theirs.

    `options` are keyword arguments of the rule.

    Raises:
      ValueError: `state` is another rule's.
    """
    if not isinstance(verify_fn, StatefulRule):
        result = verify_fn(keys, target_logits, draft, sampling, **options)
        checks.verification(result, target_logits)
        return result, state
    expected, found = jax.tree.structure(start_rule(verify_fn, 1)), jax.tree.structure(state)
    if expected != found:
        raise ValueError(
            f"state.verify_state must be the rule's own, {expected}; got {found}. "
            "Was the state made by `init` with another `verify_fn`?"
        )
    results = verify_fn(keys, target_logits, draft, sampling, state, **options)
    checks.stateful(results)
    result, after = results
    checks.verification(result, target_logits)

    def keep(old, new):
        return jnp.where(finished.reshape(-1, *(1,) * (new.ndim - 1)), old, new)

    return result, jax.tree.map(keep, state, after)
