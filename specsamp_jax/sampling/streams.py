"""Random draws, each a function of a key, a row and a named purpose."""

import enum
from typing import Any

import jax
import jax.numpy as jnp
from jax import dtypes, random
from jaxtyping import Array, Float, Int, Key, UInt32

from specsamp_jax import _checks
from specsamp_jax._types import EMIT_DRAWS, ROUNDS, KeyLike, Uniforms


class Purpose(enum.IntEnum):
    """Purpose of a stream of draws. Streams of different purposes are independent for the same key."""

    DRAFT = 1
    VERIFY = 2
    COUPLED = 3
    ROUNDS = 4


def row_keys(key: Any, batch_size: _checks.Size) -> Key[Array, "B"]:
    """One threefry key per row: `key` itself if it has one key per row, else `key` folded with the row's index."""
    _checks.key(key, batch_size)
    keys = threefry(key)
    if keys.ndim == 1:
        return keys
    return jax.vmap(random.fold_in, (None, 0))(keys, jnp.arange(batch_size))


def threefry(key: KeyLike) -> Key[Array, "*keys"]:
    """Converts keys of any implementation, or their raw words, to typed threefry keys.

    With keys of other implementations the bits of a row depend on the batch size under `vmap`. Their words are
    converted to a threefry key instead: the first two words, folded with each of the others. The raw words of a
    threefry key give that key.
    """
    typed = jnp.issubdtype(key.dtype, dtypes.prng_key)
    if typed and str(random.key_impl(key)) == "threefry2x32":
        return jnp.asarray(key)
    words = random.key_data(key).reshape(*key.shape, -1) if typed else jnp.asarray(key)
    # An implementation may have keys of one word.
    words = jnp.pad(words, [(0, 0)] * (words.ndim - 1) + [(0, max(0, 2 - words.shape[-1]))])
    keys = random.wrap_key_data(words[..., :2], impl="threefry2x32")
    fold = random.fold_in if keys.ndim == 0 else jax.vmap(random.fold_in)
    for i in range(2, words.shape[-1]):
        keys = fold(keys, words[..., i])
    return keys


def words(key: KeyLike, batch_size: _checks.Size) -> UInt32[Array, "*keys 2"]:
    """The words of `threefry(key)`, from which a kernel draws: of one key, or of one per row."""
    _checks.key(key, batch_size)
    return random.key_data(threefry(key))


def fold_in(keys: Key[Array, "B"], data: Int[Array, "..."] | int) -> Key[Array, "B"]:
    """Folds each row's key with its own number, or all keys with one number."""
    return jax.vmap(random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data), keys.shape))


def uniforms(keys: Key[Array, "B"], purpose: Purpose, num_draws: int) -> Float[Array, "B n"]:
    """Draws `num_draws` uniforms in [0, 1) per row, multiples of 2**-24, in float32.

    Draw i depends on the row's key, the purpose and i alone: asking for more draws, or for more rows,
    changes none of them.
    """

    def draw(key, index):
        bits = random.bits(random.fold_in(key, index), dtype=jnp.uint32)
        # float32 holds 24 bits below 1: one bit more could round up to 1.
        return (bits >> 8).astype(jnp.float32) * jnp.float32(2**-24)

    keys = fold_in(keys, purpose)
    return jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(keys, jnp.arange(num_draws))


def verification_uniforms(keys: Key[Array, "B"], num_draft: int) -> Uniforms:
    """The uniforms of a verification of `num_draft` drafts."""
    draws = uniforms(keys, Purpose.VERIFY, num_draft + EMIT_DRAWS)
    return Uniforms(accept=draws[:, EMIT_DRAWS:], emit=draws[:, :EMIT_DRAWS])


def block_uniforms(keys: Key[Array, "B"], num_draft: int) -> Uniforms:
    """The uniforms of a verification by the block rule: those of other rules, and three for each of its rounds."""
    rounds = uniforms(keys, Purpose.ROUNDS, 3 * ROUNDS).reshape(keys.shape[0], 3, ROUNDS)
    return verification_uniforms(keys, num_draft)._replace(rounds=rounds)
