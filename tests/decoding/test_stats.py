"""Counts of the decoding loop: acceptance by position, and the flags of degenerate rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.decoding.stats import accepted_by_position

pytestmark = pytest.mark.optimised(False)


def look_up(table, tokens, positions, cache):
    return table[tokens], cache


NUMBERS = ss.Model(np.where(np.eye(8, k=1), 99, -99).astype("f"), look_up, lambda batch_size, max_length: ())
"""Each token is followed by the next number."""


def test_acceptance_counts_positions_whose_earlier_drafts_were_accepted():
    assert accepted_by_position(np.array([10, 10, 6]), np.array([8, 4, 1])) == [0.8, 0.5, 0.25]
    assert accepted_by_position(np.array([10, 0]), np.array([5, 0])) == [0.5, 0.0]


def test_a_degenerate_row_is_reported_to_the_caller_of_the_loop():
    # Token 2 is followed by NaN; the first row never meets it.
    table = np.where(np.eye(5, k=1), 9.0, -90.0).astype("f")
    table[2] = np.nan
    target = ss.Model(jnp.asarray(table), look_up, lambda batch_size, max_length: ())
    arguments = (jax.random.key(0), jnp.array([[3], [1]]))
    options = {"target": target, "draft": None, "max_new_tokens": 3, "eos_token": 4}
    assert ss.generate(*arguments, **options).stats.status.tolist() == [0, ss.DEGENERATE_TARGET]
    first, *_, last = (item.stats.status.tolist() for item in ss.stream(*arguments, **options))
    assert first == [0, 0]
    assert last == [0, ss.DEGENERATE_TARGET]


@pytest.mark.parametrize(
    ("options", "tokens"),
    [
        ({"eos_token": 3}, [1, 2, 3]),
        # The end token is drafted after the limit.
        ({"eos_token": 6}, [1, 2, 3, 4, 5]),
        ({"eos_token": 0}, [1, 2, 3, 4, 5]),
    ],
    ids=["end", "limit", "neither"],
)
def test_drafts_after_an_end_token_or_the_limit_are_ignored_and_not_counted(options, tokens):
    options = {"target": NUMBERS, "draft": NUMBERS, "num_draft": 5, "max_new_tokens": 4, **options}
    result = ss.generate(jax.random.key(0), jnp.array([[1]]), **options)
    assert result.lengths.tolist() == [len(tokens)]
    assert result.tokens[0, : len(tokens)].tolist() == tokens
    assert (result.tokens[0, len(tokens) :] == ss.PAD_TOKEN).all()
    counts = [int(i + 1 < len(tokens)) for i in range(5)]  # every draft of the text, accepted
    assert result.stats.num_accepted.tolist() == result.stats.num_drafted.tolist() == counts
