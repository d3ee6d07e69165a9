"""Every random draw: from a key, a row and a named purpose."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import random
from jaxtyping import Array, Float, Int, Key

from specsamp_jax import _checks


class Purpose(enum.IntEnum):
    """What a stream of uniforms is for. Streams of different purposes are independent for the same key."""

    DRAFT = 1
    VERIFY = 2


def row_keys(key: Any, batch_size: int) -> Key[Array, "B"]:
    """One key a row: `key` itself where it has one a row, else `key` folded with the row's index."""
    _checks.key(key, batch_size)
    if key.ndim == 1:
        return key
    return jax.vmap(random.fold_in, (None, 0))(key, jnp.arange(batch_size))


def fold_in(keys: Key[Array, "B"], data: Int[Array, "..."] | int) -> Key[Array, "B"]:
    """Each row's key folded with its own number (or with one number for all)."""
    return jax.vmap(random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))


def uniforms(keys: Key[Array, "B"], purpose: Purpose, num_draws: int) -> Float[Array, "B n"]:
    """`num_draws` uniforms in [0, 1) a row, multiples of 2**-24, in float32.

    Draw i depends on the row's key, the purpose and i alone: asking for more draws, or for more rows,
    changes none of them.
    """

    def draw(key, index):
        bits = random.bits(random.fold_in(key, index), dtype=jnp.uint32)
        # float32 holds 24 bits below 1: one bit more could round up to 1.
        return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)

    keys = fold_in(keys, purpose)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, jnp.arange(num_draws))
