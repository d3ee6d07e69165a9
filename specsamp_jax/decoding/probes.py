"""Probes: steps that try the next longer draft length, and the text length at which the next one is due."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

NEVER = 2**31 - 1
"""Value of `GoodputState.probe_at` if no probe follows."""

_SHORTEST_WAIT, _LONGEST_WAIT = 8, 4096  # steps between two probes
_MOST_DOUBLINGS = 3  # of the wait, after probes that failed


def interval(
    lengths: tuple[int, ...],
    probe_share: float,
    *,
    costs: Float[Array, "N"],
    num_tokens: Float[Array, "N"],
    choice: Int[Array, ""],
    num_failed: Int[Array, "B"],
) -> Int[Array, "B"]:
    """Tokens of a row between two probes of the length after the chosen one."""
    longer = jnp.minimum(choice + 1, len(lengths) - 1)
    loss = costs[longer] - costs[choice] * num_tokens[longer] / num_tokens[choice]
    # A drafter that did not run reads 32 tokens first, which takes about as long as another step of one draft.
    loss += jnp.where(jnp.array(lengths)[choice] == 0, costs[longer] - costs[choice], 0)
    wait = loss / (max(probe_share, 1e-6) * costs[choice])
    wait = jnp.maximum(wait, _SHORTEST_WAIT) * (1 << jnp.minimum(num_failed, _MOST_DOUBLINGS)).astype(jnp.float32)
    return (jnp.minimum(wait, _LONGEST_WAIT) * num_tokens[choice]).astype(jnp.int32)


def probe_at(due: Int[Array, "B"], interval: Int[Array, "B"], limits: Int[Array, "B"]) -> Int[Array, "B"]:
    """`due`, or `NEVER` where fewer tokens than two intervals would follow: too few for a probe to pay."""
    return jnp.where(limits - due >= 2 * interval, due, NEVER)
