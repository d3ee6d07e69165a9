"""Threefry random numbers inside a kernel, bit for bit equal to `specsamp_jax.sampling.streams.uniforms`.

Source: Salmon, Moraes, Dror, Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3": Threefry-2x32, 20 rounds.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.config import THREADS
from pallas_kernels.types import EMIT_DRAWS, ROUNDS, Uniforms

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)
"""Bits by which each round rotates the second word. The two groups of four rounds alternate."""

PARITY = 0x1BD11BDA
"""Constant in the third word of the key schedule."""

ROUND_PARTS = -(-3 * ROUNDS // THREADS)
"""Vectors of one element per thread that hold the uniforms of a sequence's rounds: coins, then tiles, then tokens."""

Words = tuple[Any, Any]
"""Two uint32 words of a key, a counter or a result."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Noise:
    """Source of a kernel's uniforms.

    Attributes:
      keys: Key data, uint32: one key `[2]`, which is folded with the index of each row, or one key per row, `[B, 2]`.
      purpose: Value of `specsamp_jax.sampling.streams.Purpose`.
      rounds: Value of `Purpose` for the uniforms of the block rule's rounds; the other rules do not use it.
      partitionable: Value of `jax_threefry_partitionable`, which decides how JAX reduces two words to 32 bits.
    """

    keys: Any
    purpose: int = dataclasses.field(metadata={"static": True})
    partitionable: bool = dataclasses.field(metadata={"static": True})
    rounds: int | None = dataclasses.field(default=None, metadata={"static": True})


Draws = Uniforms | Noise
"""Uniforms of a verification, or the keys from which the kernel computes them."""


def threefry(key: Words, count: Words) -> Words:
    """Applies Threefry-2x32 to a key and a counter. Each word is uint32, of any shape."""
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
    """Computes uniforms of one row: float32 in [0, 1), multiples of 2**-24.

    Args:
      noise: Source of the uniforms.
      row: Index of the row.
      index: Numbers of the draws, int32 of any shape. Draw i of a row does not depend on other draws.
    """
    if len(noise.keys.shape) == 1:
        key = fold_in((noise.keys[0], noise.keys[1]), row.astype(jnp.uint32))
    else:
        key = noise.keys[row, 0], noise.keys[row, 1]
    stream = fold_in(key, jnp.uint32(noise.purpose))
    first, second = threefry(fold_in(stream, index.astype(jnp.uint32)), (jnp.uint32(0), jnp.uint32(0)))
    bits = first ^ second if noise.partitionable else first
    # Converted to int32 first, because int32 to float32 is one instruction. It is exact below 2**24.
    return (bits >> jnp.uint32(8)).astype(jnp.int32).astype(jnp.float32) * jnp.float32(2**-24)


def accept_uniform(draws: Draws, sequence: Any, position: Any) -> jax.Array:
    """The uniform that accepts or rejects the draft at a position of a sequence."""
    if isinstance(draws, Noise):
        return uniforms(draws, sequence, position + EMIT_DRAWS)
    return draws.accept[sequence, position]


def emit_uniforms(draws: Draws, sequence: Any) -> list[jax.Array]:
    """The two uniforms that sample the last token of a sequence: its tile, then its position in the tile."""
    if isinstance(draws, Noise):
        return [uniforms(draws, sequence, jnp.int32(i)) for i in range(EMIT_DRAWS)]
    return [draws.emit[sequence, i] for i in range(EMIT_DRAWS)]


def round_uniforms(noise: Noise, sequence: Any, index: jax.Array) -> jax.Array:
    """The uniforms with these numbers among those of a sequence's rounds, as `Uniforms.rounds` flattened."""
    assert noise.rounds is not None
    return uniforms(dataclasses.replace(noise, purpose=noise.rounds), sequence, index)
