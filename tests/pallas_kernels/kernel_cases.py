"""Inputs that the tests of the kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from specsamp_jax._types import Draft, Filter, SamplingParams, Uniforms
from specsamp_jax.sampling.filters import make_filter

ON_GPU = jax.default_backend() == "gpu"
"""Kernels are compiled where there is a GPU, else interpreted."""


def random_case(
    seed, batch_size, num_draft, vocab_size, *, dtype=jnp.float32, sampling=None, draft_sampling=None, kind="logits"
):
    """Arguments of a core: correlated logits, drafts sampled from the draft's filtered distribution."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shape = batch_size, num_draft + 1, vocab_size
    target = (3 * jax.random.normal(keys[0], shape)).astype(dtype)
    logits = (target[:, :-1] + jax.random.normal(keys[1], (batch_size, num_draft, vocab_size))).astype(dtype)
    target_filter = make_filter(target, sampling)
    draft_filter = make_filter(logits if num_draft else target[:, :0], draft_sampling)
    filtered = filtered_logits(logits, draft_filter)
    tokens = jax.random.categorical(keys[2], filtered).astype(jnp.int32)
    uniforms = Uniforms(
        jax.random.uniform(keys[3], (batch_size, num_draft)), jax.random.uniform(keys[4], (batch_size, 2))
    )
    normalizers = jax.nn.logsumexp(filtered, axis=-1) if kind == "normalizers" else None
    if kind == "one_hot":
        logits, draft_filter = None, Filter()
    return target, target_filter, Draft(tokens, logits, None, normalizers), draft_filter, uniforms


def filtered_logits(logits, row_filter):
    """What a filter makes of logits, written out."""
    x = logits.astype(jnp.float32)
    kept = jnp.ones(x.shape, bool) if row_filter.cutoff is None else x >= row_filter.cutoff[..., None]
    scaled = x if row_filter.scale is None else x * row_filter.scale[:, None, None]
    if row_filter.greedy is not None:
        first = jnp.argmax(x, -1, keepdims=True) == jnp.arange(x.shape[-1])
        kept = jnp.where(row_filter.greedy[:, None, None], first, kept)
    return jnp.where(kept, scaled, -jnp.inf)


ALL_FILTERS = SamplingParams(
    temperature=jnp.array([0.7, 1.3, 1.0]),
    top_k=jnp.array([50, 0, 7]),
    top_p=jnp.array([0.9, 0.8, 1.0]),
    min_p=jnp.array([0.0, 0.01, 0.0]),
)
GREEDY_FIRST = SamplingParams(temperature=jnp.array([0.0, 0.8, 1.0]))


def assert_same(got, expected, rtol=2e-5):
    """Equal decisions, and numbers equal up to rounding."""
    for name in ("num_accepted", "tokens", "status"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    for name in ("log_probs", "accept_prob"):
        np.testing.assert_allclose(getattr(got, name), getattr(expected, name), rtol=rtol, atol=rtol, err_msg=name)
