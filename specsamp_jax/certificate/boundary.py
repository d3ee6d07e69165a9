"""Boundary draws: keys whose random bits are all 0, or all 1, for any rule that draws with `jax.random`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import define_prng_impl

from specsamp_jax._types import Draft, SamplingParams
from specsamp_jax.certificate.report import Check


def _constant(bit: int) -> Any:
    """A key of an implementation whose random bits are all `bit`."""

    def random_bits(data, bit_width, shape):
        # Depends on the data, so that it has a batch axis under vmap.
        zero = (data.sum() * 0).astype(f"uint{bit_width}")
        return jnp.full(shape, 2**bit_width - 1 if bit else 0, f"uint{bit_width}") + zero

    return define_prng_impl(
        key_shape=(2,),
        seed=lambda seed: jnp.zeros(2, jnp.uint32) + (seed * 0).astype(jnp.uint32),
        split=lambda data, shape: jnp.broadcast_to(data, (*shape, 2)),
        random_bits=random_bits,
        fold_in=lambda data, number: data,
        name=f"constant_{bit}",
        tag=f"c{bit}",
    )


IMPLEMENTATIONS = {"all bits 0": _constant(0), "all bits 1": _constant(1)}


def checks(verify_fn: Callable[..., Any]) -> list[Check]:
    """Holds the emitted tokens of a few steps against the tokens that have a positive probability."""
    # The probable tokens stand in the middle: a sampler that runs past either end finds probability zero.
    p = np.array([0, 0.5, 0.5, 0], np.float32)
    q = np.full(4, 0.25, np.float32)
    with np.errstate(divide="ignore"):
        target = jnp.asarray(np.log(np.tile(p, (4, 2, 1))))
    draft = Draft(jnp.arange(4, dtype=jnp.int32)[:, None], jnp.log(jnp.tile(q, (4, 1, 1))), SamplingParams())
    found = []
    for name, implementation in IMPLEMENTATIONS.items():
        key = jax.random.wrap_key_data(jnp.zeros(2, jnp.uint32), impl=implementation)
        tokens = np.asarray(jax.jit(verify_fn)(key, target, draft, SamplingParams()).tokens)
        wrong = int(np.isin(tokens, [0, 3]).any(1).sum())
        detail = f"{wrong} of 4 rows emitted a token of probability zero"
        found.append(Check(f"boundary, {name}", wrong == 0, detail, 4))
    return found
