"""The training loop: interruptions change no weight, checkpoints of other trainings are refused."""

import functools
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specsamp_jax.train import loop

pytestmark = pytest.mark.optimised(False)

PARAMS = {"w": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "b": jnp.zeros(2)}
FROZEN = jnp.array([0.3, -0.1])


@pytest.fixture(autouse=True)
def _interrupts_raise():
    """A shell starts commands in the background with Ctrl-C ignored, and so would these tests be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def loss_fn(params, frozen, batch):
    return ((jnp.tanh(batch @ params["w"] + params["b"]) - frozen) ** 2).mean()


def batch_fn(step):
    return jax.random.normal(jax.random.fold_in(jax.random.key(1), step), (4, 2))


def stop_at(step, progress):
    """Interrupts a training as Ctrl-C does."""
    if progress.num_done == step:
        signal.raise_signal(signal.SIGINT)


def train(folder, **options):
    options = {"num_steps": 30, "minutes": None, "learning_rate": 0.1, "settings": {"seed": 3}} | options
    options = {"weight_decay": 0.01, "save_seconds": 60.0, "progress_fn": lambda progress: None} | options
    return loop.train(loss_fn, PARAMS, FROZEN, batch_fn, folder=folder, **options)


@pytest.mark.parametrize("save_seconds", [0.0, 60.0])
def test_an_interrupted_training_ends_with_the_same_weights(tmp_path, save_seconds):
    once, _ = train(tmp_path / "once")
    assert loss_fn(once, FROZEN, batch_fn(99)) < 0.7 * loss_fn(PARAMS, FROZEN, batch_fn(99))
    for step in (10, 20):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "twice", progress_fn=functools.partial(stop_at, step), save_seconds=save_seconds)
        with np.load(tmp_path / "twice/state.npz") as state:
            assert state["step"] == step
    twice, _ = train(tmp_path / "twice")
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_an_interruption_while_a_step_is_computed_loses_no_step(tmp_path, monkeypatch):
    jit = jax.jit

    def interrupted_jit(function, **options):
        compiled, num_calls = jit(function, **options), 0

        def call(*arguments):
            nonlocal num_calls
            outputs, num_calls = compiled(*arguments), num_calls + 1
            if options and num_calls == 13:
                signal.raise_signal(signal.SIGINT)  # the previous state is donated, and the next not returned
            return outputs

        return call

    monkeypatch.setattr(jax, "jit", interrupted_jit)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    with np.load(tmp_path / "state.npz") as state:
        assert state["step"] == 13
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_interruption_is_not_held(tmp_path):
    def stop(progress):
        if progress.num_done == 10:
            stop_at(10, progress)
            with pytest.raises(KeyboardInterrupt):
                stop_at(10, progress)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress_fn=stop)


def test_progress_is_told_before_the_first_step(tmp_path):
    told = []
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, progress_fn=functools.partial(stop_at, 10))
    train(tmp_path, progress_fn=told.append)
    assert told[0] == loop.Progress("training", 10, 30)
    assert [progress.num_done for progress in told[1:]] == [20, 30]


def test_a_finished_training_is_not_repeated(tmp_path):
    once, _ = train(tmp_path)
    again, _ = train(tmp_path, progress_fn=functools.partial(stop_at, 10))
    jax.tree.map(np.testing.assert_array_equal, once, again)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"learning_rate": 0.5}, "holds a training with learning_rate = 0.1, and 0.5 was asked for; remove"),
        ({"settings": {"seed": 4}}, "holds a training with seed = 3, and 4 was asked for"),
        ({"num_steps": 31}, "holds a training with num_steps = 30, and 31 was asked for"),
    ],
)
def test_another_training_is_refused(tmp_path, options, sentence):
    train(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path, **options)


def test_a_broken_checkpoint_is_refused(tmp_path):
    train(tmp_path)
    content = (tmp_path / "state.npz").read_bytes()
    (tmp_path / "state.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="is not a whole checkpoint of this training"):
        train(tmp_path)


def test_minutes_are_turned_into_steps_once(tmp_path):
    options = {"num_steps": None, "minutes": 1e-4}
    _, num_steps = train(tmp_path, **options)
    assert num_steps >= 1
    assert train(tmp_path, **options)[1] == num_steps


def test_the_rate_rises_and_falls():
    rates = [loop.learning_rate_at(step, 1000, 1.0) for step in (0, 99, 549, 999)]
    np.testing.assert_allclose(rates, [0.01, 1.0, 0.5, 0.0], atol=1e-6)
