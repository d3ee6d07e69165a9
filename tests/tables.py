"""Language models small enough to enumerate: logits by the last two tokens, looked up in a table.

The cache holds the text, by position. A loop that leaves a rejected draft in the cache, or passes a token with a wrong
position, therefore reads the wrong row of the table.
"""

import jax.numpy as jnp
import numpy as np

import specsamp_jax as ss

VOCAB = 4


def apply_fn(table, tokens, positions, cache):
    """Writes the tokens into the cache, and looks up the last two at each position."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    cache = cache.at[rows, positions].set(tokens, mode="drop")
    before = jnp.where(positions > 0, cache[rows, jnp.maximum(positions - 1, 0)], 0)
    return table[before, tokens], cache


def init_cache_fn(batch_size, max_length):
    return jnp.full((batch_size, max_length), -(10**6), jnp.int32)


def table(seed, sharpness=1.5):
    return np.random.default_rng(seed).normal(size=(VOCAB, VOCAB, VOCAB)).astype(np.float32) * sharpness


def model(table):
    return ss.Model(jnp.asarray(table), apply_fn, init_cache_fn)


def counted():
    """An `apply_fn`, and the list to which each of its traces adds the shape of the tokens."""
    traces = []

    def counted_apply_fn(table, tokens, positions, cache):
        traces.append(tokens.shape)
        return apply_fn(table, tokens, positions, cache)

    return counted_apply_fn, traces


def logits_after(table, text):
    """Logits of the model after a text."""
    return table[text[-2] if len(text) > 1 else 0, text[-1]]
