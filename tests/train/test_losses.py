"""Training: losses by hand, and that fitting lowers them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import specsamp_jax as ss
from specsamp_jax import train
from specsamp_jax.models import Llama, LlamaConfig

pytestmark = pytest.mark.optimised(False)

SIZES = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
TEXT = jnp.asarray(np.tile([1, 4, 2, 7, 3, 3, 5], 60))


def llama(hidden_size, seed):
    return Llama(LlamaConfig(vocab_size=8, hidden_size=hidden_size, **SIZES), rngs=nnx.Rngs(seed))


def windows(num):
    for key in jax.random.split(jax.random.key(0), num):
        yield train.random_windows(key, TEXT, batch_size=8, length=13)


def test_losses_by_hand():
    p, q = jnp.array([[0.5, 0.5, 0.0]]), jnp.array([[0.25, 0.5, 0.25]])
    np.testing.assert_allclose(train.kl_divergence(jnp.log(p), jnp.log(q)), 0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(train.total_variation(jnp.log(p), jnp.log(q)), 0.25, rtol=1e-6)
    logits = jnp.log(jnp.array([[[0.25, 0.75]]]))
    np.testing.assert_allclose(train.next_token_loss(logits, jnp.array([[1, 0]])), [[np.log(4)]], rtol=1e-6)


def test_windows_are_stretches_of_the_text():
    for window in next(windows(1)).tolist():
        start = TEXT.tolist().index(window[0])
        assert any(TEXT[i : i + 13].tolist() == window for i in range(start, start + 7))


def test_a_model_learns_and_a_drafter_learns_from_it():
    target, drafter = llama(16, 0), llama(8, 1)
    graphdef, params = nnx.split(target)
    losses = []
    for step in train.fit(train.model_loss(graphdef), params, windows(120), optax.adam(1e-2)):
        losses.append(float(step[1]))
    nnx.update(target, step[0])
    assert losses[0] > 1.9
    assert losses[-1] < 0.5
    graphdef, params = nnx.split(drafter)
    text = next(windows(1))
    positions = jnp.broadcast_to(jnp.arange(12), (8, 12))

    def acceptance():
        logits = jax.jit(lambda: [model(text[:, :-1], positions)[0] for model in (target, drafter)])()
        return ss.acceptance_rate(*logits).mean()

    before = acceptance()
    loss_fn = train.distillation_loss(graphdef, target, train.total_variation)
    for step in train.fit(loss_fn, params, windows(120), optax.adam(1e-2)):
        losses.append(float(step[1]))
    nnx.update(drafter, step[0])
    assert acceptance() > max(0.8, before + 0.2)
    np.testing.assert_allclose(losses[-1], 1 - acceptance(), atol=0.1)


def test_padding_does_not_count_in_distillation():
    target, drafter = llama(16, 0), llama(8, 1)
    graphdef, params = nnx.split(drafter)
    loss_fn = jax.jit(train.distillation_loss(graphdef, target, train.kl_divergence))
    text = next(windows(1))
    short = loss_fn(params, text[:, :7])
    padded = jnp.concatenate([text[:, :7], jnp.full((8, 6), ss.PAD_TOKEN)], axis=1)
    # The last real token of a row is followed by padding: what comes after it is counted, what comes later is not.
    np.testing.assert_allclose(
        loss_fn(params, padded) * 7 - short * 6, loss_fn(params, text[:, :8]) * 7 - short * 6, rtol=1e-4
    )
