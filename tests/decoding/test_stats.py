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


@pytest.mark.parametrize(
    ("options", "tokens"), [({"eos_token": 3}, [1, 2, 3]), ({"max_new_tokens": 2}, [1, 2, 3]), ({}, [1, 2, 3, 4, 5])]
)
def test_drafts_after_an_end_token_or_the_limit_are_not_counted(options, tokens):
    def numbers(table, tokens, positions, cache):
        return table[tokens], cache

    model = ss.Model(jnp.where(jnp.eye(8, k=1), 9.0, -90.0), numbers, lambda batch_size, max_length: ())
    options = {"max_new_tokens": 4, "sampling": ss.SamplingParams(0.0), **options}
    result = ss.generate(jax.random.key(0), jnp.array([[1]]), target=model, draft=model, num_draft=4, **options)
    assert result.tokens[0, : result.lengths[0]].tolist() == tokens
    counts = [int(i + 1 < len(tokens)) for i in range(4)]  # every draft of the text, accepted
    assert result.stats.num_accepted.tolist() == result.stats.num_drafted.tolist() == counts
