"""Inputs of the GPU tests and timings: real shapes, acceptance of about .8."""

import functools

import jax
import jax.numpy as jnp

from specsamp_jax._types import Draft, Filter, Uniforms

NOISE = 0.5
"""Two normal logits apart by this much share 2 Phi(-NOISE / 2) = .80 of their mass."""


@functools.partial(jax.jit, static_argnames=("batch_size", "num_draft", "vocab_size", "dtype", "kind"))
def make(key, batch_size, num_draft, vocab_size, dtype, kind):
    """Arguments of a core; kind is "logits", "normalizers" (handed over) or "one_hot"."""
    keys = jax.random.split(key, 5)
    shape = batch_size, num_draft + 1, vocab_size
    target = (3 * jax.random.normal(keys[0], shape, jnp.float32)).astype(dtype)
    noise = NOISE * jax.random.normal(keys[1], (batch_size, num_draft, vocab_size), jnp.float32)
    logits = (target[:, :-1].astype(jnp.float32) + noise).astype(dtype)
    tokens = jax.random.categorical(keys[2], logits.astype(jnp.float32)).astype(jnp.int32)
    uniforms = Uniforms(
        jax.random.uniform(keys[3], (batch_size, num_draft)), jax.random.uniform(keys[4], (batch_size, 2))
    )
    normalizers = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) if kind == "normalizers" else None
    draft = Draft(tokens, None if kind == "one_hot" else logits, None, normalizers)
    return target, Filter(), draft, Filter(), uniforms
