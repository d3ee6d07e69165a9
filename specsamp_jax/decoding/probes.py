"""Probes: steps that try the next longer draft length, and the text length at which the next one is due.

All functions take NumPy arrays too, and then compute with NumPy.
"""

from typing import Any

from jaxtyping import Float, Int

NEVER = 2**31 - 1
"""Value of `GoodputState.probe_at` if no probe follows."""

_SHORTEST_WAIT, _LONGEST_WAIT = 8, 4096  # steps between two probes
_MOST_DOUBLINGS = 3  # of the wait, after probes that failed


def interval(
    lengths: tuple[int, ...],
    probe_share: float,
    costs: Float[Any, "N1"],
    num_tokens: Float[Any, "N"],
    choice: Int[Any, ""],
    num_failed: Int[Any, "B"],
) -> Int[Any, "B"]:
    """Tokens of a row between two probes of the length after the chosen one; `costs` are those of `Measured`."""
    xp, change_cost = costs.__array_namespace__(), costs[-1]
    tried = longer(lengths, choice)
    # The way back costs nothing: that length has run in this call.
    loss = costs[tried] - costs[choice] * num_tokens[tried] / num_tokens[choice] + change_cost
    # A drafter that did not run reads 32 tokens first, which takes about as long as another step of one draft.
    loss += xp.where(xp.asarray(lengths)[choice] == 0, costs[tried] - costs[choice], 0)
    wait = loss / (max(probe_share, 1e-6) * costs[choice])
    wait = xp.maximum(wait, _SHORTEST_WAIT) * (1 << xp.minimum(num_failed, _MOST_DOUBLINGS)).astype(xp.float32)
    return (xp.minimum(wait, _LONGEST_WAIT) * num_tokens[choice]).astype(xp.int32)


def probe_at(due: Int[Any, "B"], interval: Int[Any, "B"], limits: Int[Any, "B"]) -> Int[Any, "B"]:
    """`due`, or `NEVER` where fewer tokens than two intervals would follow: too few for a probe to pay."""
    return due.__array_namespace__().where(limits - due >= 2 * interval, due, NEVER)


def longer(lengths: tuple[int, ...], choice: Int[Any, ""]) -> Int[Any, ""]:
    """Index of the next longer length, which a probe tries; the last index has no longer one and is returned."""
    return choice + (choice < len(lengths) - 1).astype(choice.dtype)
