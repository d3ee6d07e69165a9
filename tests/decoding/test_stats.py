"""Counts of the decoding loop: acceptance by position, and the flags of degenerate rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.decoding.stats import accepted_by_position

pytestmark = pytest.mark.optimised(False)


def test_acceptance_counts_positions_whose_earlier_drafts_were_accepted():
    assert accepted_by_position(np.array([10, 10, 6]), np.array([8, 4, 1])) == [0.8, 0.5, 0.25]
    assert accepted_by_position(np.array([10, 0]), np.array([5, 0])) == [0.5, 0.0]


def test_a_degenerate_row_is_reported_to_the_caller_of_the_loop():
    def bigrams(table, tokens, positions, cache):
        return table[tokens], cache

    # Token 2 is followed by NaN; the first row never meets it.
    table = jnp.where(jnp.eye(5, k=1), 9.0, -90.0).at[2].set(jnp.nan)
    target = ss.Model(table, bigrams, lambda batch_size, max_length: ())
    arguments = (jax.random.key(0), jnp.array([[3], [1]]))
    options = {"target": target, "draft": None, "max_new_tokens": 3, "eos_token": 4}
    assert ss.generate(*arguments, **options).stats.status.tolist() == [0, ss.DEGENERATE_TARGET]
    first, *_, last = (item.stats.status.tolist() for item in ss.stream(*arguments, **options))
    assert first == [0, 0]
    assert last == [0, ss.DEGENERATE_TARGET]
