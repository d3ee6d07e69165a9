"""Keys of a step: what the rule and the drafter draw from."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Int, Key

from specsamp_jax._types import KeyLike
from specsamp_jax.decoding.drafters import Drafter, DraftsCoupled
from specsamp_jax.sampling import streams


class StepKeys(NamedTuple):
    """Keys of the rows in one step.

    Attributes:
      verify: For the rule.
      verify_options: Keyword arguments of the rule: `positions` if it takes them.
      draft: For the drafter.
      propose_fn: The method of the drafter that draws with `draft`; None without a drafter.
    """

    verify: Key[Array, "B"]
    verify_options: dict[str, Any]
    draft: Key[Array, "B"]
    propose_fn: Callable[..., Any] | None


def step_keys(
    key: KeyLike, lengths: Int[Array, "B"], drafter: Drafter | None, verify_fn: Callable[..., Any]
) -> StepKeys:
    """The keys of a step that begins at `lengths`.

    Each step folds its lengths into the rows' keys, so that steps share no draws. A rule with a parameter `positions`
    draws by position, and gets the keys of the rows and the position of each row's first new token. Where such a rule
    meets a drafter that can draw with the same noise, the drafter gets the keys of the rows too.
    """
    rows = streams.row_keys(key, lengths.shape[0])
    step = streams.fold_in(rows, lengths)
    propose_fn = None if drafter is None else drafter.propose
    if "positions" not in inspect.signature(verify_fn).parameters:
        return StepKeys(step, {}, step, propose_fn)
    options = {"positions": lengths}
    if isinstance(drafter, DraftsCoupled):
        return StepKeys(rows, options, rows, drafter.propose_coupled)
    return StepKeys(rows, options, step, propose_fn)
