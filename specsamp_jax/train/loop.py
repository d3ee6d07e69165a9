"""A training loop that an interruption does not change: AdamW, warm-up and cosine, and checkpoints."""

import contextlib
import io
import json
import math
import os
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from specsamp_jax._files import read_json

WARM_UP = 100  # steps; a tenth of a shorter training
_TRIAL = 3  # steps timed, after one that compiles
STATE, _SETTINGS = "state.npz", "settings.json"
_HINT = "remove that folder to begin anew, or write to another"

LossFn = Callable[[Any, Any, Any], Float[Array, ""]]
"""`(params, frozen, batch) -> loss`; `frozen` holds arrays that are not trained."""


class Progress(NamedTuple):
    """The state of a task.

    Attributes:
      task: Its name.
      num_done: Units done.
      num_total: Units in all.
      loss: The last loss of a training.
    """

    task: str
    num_done: int
    num_total: int
    loss: float | None = None


ProgressFn = Callable[[Progress], None]
"""Called at the start of a task and after some or all of its units."""


def learning_rate_at(step: int, num_steps: int, peak: float) -> np.float32:
    """Returns a linear warm-up to `peak`, then a cosine down to 0 after `num_steps`."""
    warm_up = min(WARM_UP, num_steps // 10 + 1)
    if step < warm_up:
        return np.float32(peak * (step + 1) / warm_up)
    share = (step + 1 - warm_up) / (num_steps - warm_up)
    return np.float32(peak / 2 * (1 + math.cos(math.pi * share)))


def optimizer(weight_decay: float) -> optax.GradientTransformation:
    """Returns AdamW (Loshchilov and Hutter, 2019, arXiv 1711.05101) with clipped gradients, without a rate."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.98), optax.add_decayed_weights(weight_decay)
    )


def train(
    loss_fn: LossFn,
    params: Any,
    frozen: Any,
    batch_fn: Callable[[int], Any],
    *,
    folder: Path,
    settings: Mapping[str, Any],
    num_steps: int | None,
    minutes: float | None,
    learning_rate: float,
    weight_decay: float,
    save_seconds: float,
    progress_fn: ProgressFn,
) -> tuple[Any, int]:
    """Trains from the last checkpoint in `folder`, or from the beginning, and returns the parameters and the steps.

    The parameters depend on the arguments alone, not on interruptions: all randomness is in `batch_fn`.

    Args:
      loss_fn: The loss.
      params: The initial parameters, float32.
      frozen: Arrays for `loss_fn` that stay as they are.
      batch_fn: Returns the batch of a step.
      folder: The folder of checkpoints, which are replaced by newer ones.
      settings: Values that decide the result; a checkpoint of others is refused.
      num_steps: The number of steps. None: as many as `minutes` allow, which is decided by timing a few at the start.
      minutes: The time for all steps, compilation excluded; used if `num_steps` is None.
      learning_rate: The peak of the rate.
      weight_decay: AdamW's.
      save_seconds: Time between checkpoints. One is also written at Ctrl-C, after the present step; a
        second Ctrl-C is raised at once.
      progress_fn: See `ProgressFn`.

    Raises:
      ValueError: The folder holds a checkpoint of other settings.
    """
    transform = optimizer(weight_decay)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, frozen, batch, rate):
        loss, gradients = jax.value_and_grad(loss_fn)(params, frozen, batch)
        updates, opt_state = transform.update(gradients, opt_state, params)
        updates = jax.tree.map(lambda u: -rate * u, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    state = jax.tree.map(jnp.copy, params), jax.jit(transform.init)(params)
    settings = {**settings, "learning_rate": learning_rate, "weight_decay": weight_decay, "minutes": minutes}
    folder.mkdir(parents=True, exist_ok=True)
    found = _read_settings(folder, {**settings, "num_steps": num_steps})
    if found is not None:
        num_steps = found
    elif num_steps is None:
        num_steps = _affordable(update, state, frozen, batch_fn, 60 * (minutes or 0))
    (folder / _SETTINGS).write_text(json.dumps({**settings, "num_steps": num_steps}, indent=2) + "\n")
    step, state = _restore(folder / STATE, state)
    progress_fn(Progress("training", step, num_steps))
    saved = told = time.monotonic()
    with _interrupts_held() as interrupted:
        while step < num_steps and not interrupted.is_set():
            rate = learning_rate_at(step, num_steps, learning_rate)
            *updated, loss = update(*state, frozen, batch_fn(step), rate)
            state, step = tuple(updated), step + 1
            if time.monotonic() - saved > save_seconds:
                _save(folder / STATE, step, state)
                saved = time.monotonic()
            if step % 10 == 0 or step == num_steps or time.monotonic() - told > 1:
                progress_fn(Progress("training", step, num_steps, float(loss)))
                told = time.monotonic()
        _save(folder / STATE, step, state)
    if interrupted.is_set():
        raise KeyboardInterrupt
    return state[0], num_steps


@contextlib.contextmanager
def _interrupts_held() -> Iterator[threading.Event]:
    """While it lasts, Ctrl-C sets the event, and only a second one is raised.

    Raised while a step is computed, it would lose the training: the old state is donated, the new one not returned yet.
    """
    held, handler = threading.Event(), signal.getsignal(signal.SIGINT)
    # Signals are handled by the main thread; a handler that is no function ignores them, as under nohup.
    if threading.current_thread() is not threading.main_thread() or handler is None or isinstance(handler, int):
        yield held
        return

    def hold(number, frame):
        if held.is_set():
            handler(number, frame)
        held.set()

    signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, handler)


def _affordable(update: Any, state: Any, frozen: Any, batch_fn: Callable[[int], Any], seconds: float) -> int:
    """The number of steps that take `seconds`, measured on copies of the state."""
    state = jax.tree.map(jnp.copy, state)

    def run(num: int) -> float:
        nonlocal state
        began = time.monotonic()
        for i in range(num):
            *updated, _ = update(*state, frozen, batch_fn(i), np.float32(0))
            state = tuple(updated)
        jax.block_until_ready(state)
        return time.monotonic() - began

    run(1)  # compiles
    return max(1, math.floor(seconds * _TRIAL / run(_TRIAL)))


def _read_settings(folder: Path, settings: Mapping[str, Any]) -> int | None:
    """The number of steps of the training that `folder` holds, after a comparison; None if it holds none."""
    held = read_json(folder / _SETTINGS, required=False)
    if not held or not (folder / STATE).exists():
        return None
    plain = json.loads(json.dumps(settings))
    for name, value in plain.items():
        if held.get(name) != value and not (name == "num_steps" and value is None):
            raise ValueError(
                f"{folder} holds a training with {name} = {held.get(name)!r}, and {value!r} was asked for; {_HINT}."
            )
    return int(held["num_steps"])


def _save(path: Path, step: int, state: Any) -> None:
    """Replaces a checkpoint at once, so that an interruption leaves the old one or the new one."""
    arrays: dict[str, Any] = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    content = io.BytesIO()
    np.savez(content, step=np.int64(step), **arrays)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content.getbuffer())
    os.replace(temporary, path)


def _restore(path: Path, state: Any) -> tuple[int, Any]:
    """The step and the state of a checkpoint; 0 and `state` if there is none."""
    if not path.exists():
        return 0, state
    leaves, structure = jax.tree.flatten(state)
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            stored = [file[str(i)] for i in range(len(leaves))]
            step = int(file["step"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a whole checkpoint of this training: {error}; {_HINT}.") from error
    for leaf, value in zip(leaves, stored, strict=True):
        if leaf.shape != value.shape or leaf.dtype != value.dtype:
            raise ValueError(f"{path} must hold arrays of this drafter's shapes, got {value.shape}; {_HINT}.")
    return step, jax.tree.unflatten(structure, map(jnp.asarray, stored))
