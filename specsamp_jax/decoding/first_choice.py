"""Data of a `GoodputNumDraft`, and the choice before the first step, which depends on no text."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from specsamp_jax.decoding import expected_tokens, probes
from specsamp_jax.decoding.goodput import GoodputNumDraft
from specsamp_jax.decoding.goodput_state import FirstChoice, Measured

_NO_CHOICE = 2**29  # steps


def measured(rule: GoodputNumDraft, batch_size: Any, max_new_tokens: int) -> Measured:
    """Returns the data of a rule, in arrays on the device that all calls of `generate` share.

    Each call would move NumPy arrays to a GPU one after the other, which takes up to .1 ms each. With a mesh they are
    NumPy arrays, because an array that is made with a mesh lies on all its devices.
    """
    # Of a symbolic batch the first choice is that of one row.
    arguments = rule, batch_size if isinstance(batch_size, int) else 1, max_new_tokens
    if not jax.sharding.get_abstract_mesh().empty:
        return _on_host(*arguments)
    return _on_device(jax.config.jax_default_device, *arguments)


@functools.lru_cache(maxsize=64)
def _on_device(default_device: Any, *arguments: Any) -> Measured:
    """The data as arrays on the default device, which is an argument so that they are kept for each such device."""
    with jax.ensure_compile_time_eval():
        return jax.device_put(_on_host(*arguments))


@functools.lru_cache(maxsize=64)
@np.errstate(over="ignore")
def _on_host(rule: GoodputNumDraft, batch_size: int, max_new_tokens: int) -> Measured:
    """The data of a rule as NumPy arrays, with the first choice, which is made here and remembered."""
    costs = np.array([*rule.costs, rule.change_cost], np.float32)
    prior = np.broadcast_to(np.asarray(rule.prior, np.float32), (rule.lengths[-1],))
    num_rows = max(batch_size, 1)
    none = np.zeros((num_rows, rule.lengths[-1]), np.float32)
    left = np.full((num_rows,), max_new_tokens, np.int32)
    is_measured = isinstance(rule.prior, tuple)
    num_tokens, time = expected_tokens.estimates(
        rule.lengths, costs[:-1], prior, none, none, left, is_measured=is_measured
    )
    best = int(np.argmin(time))
    choice = np.int32(best if time[best] * (1 + rule.hysteresis) < time[0] else 0)
    no_probes = np.zeros((1,), np.int32)
    interval = probes.interval(rule.lengths, rule.probe_share, costs, num_tokens, choice, no_probes)
    limits = np.full((1,), max_new_tokens, np.int32)
    wait = int(probes.probe_at(interval, interval, limits)[0])
    first = FirstChoice(
        choice=int(choice),
        interval=_NO_CHOICE if _is_final(rule, costs[:-1], choice) else rule.steps_per_choice,
        wait=-1 if wait == probes.NEVER else wait,
        num_expected=float(num_tokens[probes.longer(rule.lengths, choice)]),
    )
    return Measured(costs, prior, np.array(first, np.float32))


@functools.lru_cache(maxsize=64)
def without_data(rule: GoodputNumDraft) -> GoodputNumDraft:
    """Returns the part of a rule that is compiled in; costs, prior and `change_cost` are the same for all."""
    prior = (0.5,) * rule.lengths[-1] if isinstance(rule.prior, tuple) else 0.5
    return dataclasses.replace(rule, costs=(1.0,) * len(rule.costs), prior=prior, change_cost=0.0)


def _is_final(rule: GoodputNumDraft, costs: Float[np.ndarray, "N"], choice: Int[Any, ""]) -> bool:
    """Whether every other length costs more per token even if all its drafts are accepted (see `costs.forced`)."""
    least = costs / (np.array(rule.lengths, np.float32) + 1)
    return bool(((least > costs[choice]) | (np.arange(len(rule.lengths)) == choice)).all())
