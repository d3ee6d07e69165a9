"""Threefry in a kernel: the uniforms of `specsamp_jax.sampling.streams`, bit for bit.

Source: Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3": Threefry-2x32, 20 rounds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.types import EMIT_DRAWS, Uniforms

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
"""Rotations of the second word in bits, alternating every four rounds."""

PARITY = 0x1BD11BDA
"""Constant of the third word of the key schedule."""

Words = tuple[Any, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Source of a kernel's uniforms.

    Attributes:
      keys: Key data, uint32: one key `[2]`, which each row folds with its own number, or one per row, `[B, 2]`.
      purpose: Number of the stream.
      partitionable: Value of `jax_threefry_partitionable`, which decides how JAX reduces two words to 32 bits.
    """

    keys: Any
    purpose: int = dataclasses.field(metadata={"static": True})
    partitionable: bool = dataclasses.field(metadata={"static": True})


Draws = Uniforms | Noise
"""Uniforms of a verification, or the keys that the kernel computes them from."""


def threefry(key: Words, count: Words) -> Words:
    """Threefry-2x32 of a key and a counter of two words each, uint32 and of any shape; returns two words."""
    schedule = *key, key[0] ^ key[1] ^ jnp.uint32(PARITY)
    x, y = count[0] + schedule[0], count[1] + schedule[1]
    for group in range(5):
        for rotation in ROTATIONS[group % 2]:
            x = x + y
            y = ((y << jnp.uint32(rotation)) | (y >> jnp.uint32(32 - rotation))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


def fold_in(key: Words, data: Any) -> Words:
    """Equals `jax.random.fold_in(key, data)` for data from 0 to 2**32 - 1."""
    return threefry(key, (jnp.uint32(0), data))


def uniforms(noise: Noise, row: Any, index: jax.Array) -> jax.Array:
    """Uniforms of one row in [0, 1), float32, multiples of 2**-24: those of the draws `index`, int32 of any shape."""
    if len(noise.keys.shape) == 1:
        key = fold_in((noise.keys[0], noise.keys[1]), row.astype(jnp.uint32))
    else:
        key = noise.keys[row, 0], noise.keys[row, 1]
    stream = fold_in(key, jnp.uint32(noise.purpose))
    first, second = threefry(fold_in(stream, index.astype(jnp.uint32)), (jnp.uint32(0), jnp.uint32(0)))
    bits = first ^ second if noise.partitionable else first
    # Converted through int32, because that conversion to float32 is one instruction; below 2**24 it is exact.
    return (bits >> jnp.uint32(8)).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def accept_uniform(draws: Draws, sequence: Any, position: Any) -> jax.Array:
    """The uniform that decides on the draft at a position of a sequence."""
    if isinstance(draws, Noise):
        return uniforms(draws, sequence, position + EMIT_DRAWS)
    return draws.accept[sequence, position]


def emit_uniforms(draws: Draws, sequence: Any) -> list[jax.Array]:
    """The uniforms of a sequence's last token."""
    if isinstance(draws, Noise):
        return [uniforms(draws, sequence, jnp.int32(i)) for i in range(EMIT_DRAWS)]
    return [draws.emit[sequence, i] for i in range(EMIT_DRAWS)]
