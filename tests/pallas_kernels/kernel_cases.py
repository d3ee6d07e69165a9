"""Inputs and comparisons that the tests of the kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_inputs import random_inputs

from specsamp_jax._types import SamplingParams

ON_GPU = jax.default_backend() == "gpu"
"""Kernels are compiled where there is a GPU, else interpreted."""

QUICK = pytest.mark.optimised(ON_GPU)
"""The mark of tests whose interpreted kernels compile for longer than they run."""


def random_case(seed, batch_size, num_draft, vocab_size, *, dtype=jnp.float32, kind="logits", **filters):
    """Arguments of a core: correlated logits, drafts sampled from the draft's filtered distribution."""

    @jax.jit  # one program in place of dozens of small ones
    def inputs(key):
        return random_inputs(key, batch_size, num_draft, vocab_size, dtype, kind, noise=1.0, **filters)

    return inputs(jax.random.key(seed))


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
