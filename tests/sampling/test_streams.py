"""Every random draw: from a key, a row and a named purpose, and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from specsamp_jax.sampling import streams
from specsamp_jax.sampling.streams import Purpose

FALSE_ALARM = 1e-4
"""How often each test of a law below fails though the draws are right. Keys are fixed: passing ones keep passing."""

uniforms = jax.jit(streams.uniforms, static_argnums=(1, 2))
row_keys = jax.jit(streams.row_keys, static_argnums=1)


@pytest.fixture(scope="module")
def many():
    """20,000 rows of one key, 5 draws each, of both purposes."""
    keys = row_keys(jax.random.key(0), 20_000)
    return {purpose: np.asarray(uniforms(keys, purpose, 5), np.float64) for purpose in Purpose}


def test_draws_are_in_zero_to_one_on_a_grid_of_24_bits(many):
    for draws in many.values():
        assert draws.min() >= 0
        assert draws.max() < 1
        assert np.all(draws * 2**24 == np.floor(draws * 2**24))


@pytest.mark.parametrize(("bits", "expected"), [(0, 0.0), (0xFF, 0.0), (0x100, 2.0**-24), (2**32 - 1, 1 - 2.0**-24)])
def test_the_extreme_bits_make_no_one(monkeypatch, bits, expected):
    monkeypatch.setattr(streams.random, "bits", lambda key, **kwargs: jnp.uint32(bits))
    assert float(streams.uniforms(jax.random.split(jax.random.key(0), 1), Purpose.VERIFY, 1)[0, 0]) == expected


def test_draws_are_uniform(many):
    for draws in many.values():
        for column in draws.T:
            assert scipy.stats.kstest(column, "uniform").pvalue > FALSE_ALARM / 10


def test_draws_of_neighbours_and_purposes_are_independent(many):
    pairs = [(draws[:, i], draws[:, j]) for draws in many.values() for i in range(5) for j in range(i)]
    pairs += [(many[Purpose.DRAFT][:, i], many[Purpose.VERIFY][:, j]) for i in range(5) for j in range(5)]
    pairs += [(draws[1:, i], draws[:-1, i]) for draws in many.values() for i in range(5)]
    for x, y in pairs:
        counts, _, _ = np.histogram2d(x, y, bins=8, range=[[0, 1]] * 2)
        assert scipy.stats.chisquare(counts.ravel()).pvalue > FALSE_ALARM / len(pairs)


def test_no_draw_is_shared_between_purposes(many):
    draft, verify = (set(map(tuple, many[purpose][:, :2])) for purpose in Purpose)
    assert not draft & verify


def test_more_draws_and_more_rows_change_none():
    keys = row_keys(jax.random.key(3), 8)
    full = uniforms(keys, Purpose.VERIFY, 6)
    assert jnp.array_equal(uniforms(keys, Purpose.VERIFY, 2), full[:, :2])
    some = jnp.array([5, 0, 7])
    assert jnp.array_equal(uniforms(keys[some], Purpose.VERIFY, 6), full[some])
    assert jnp.array_equal(row_keys(jax.random.key(3), 3), keys[:3])


def test_one_key_is_folded_with_the_row_and_one_a_row_is_taken_as_it_is():
    key = jax.random.key(4)
    keys = row_keys(key, 3)
    assert all(bool(keys[row] == jax.random.fold_in(key, row)) for row in range(3))
    assert bool(jnp.all(row_keys(keys, 3) == keys))
    assert len({tuple(data) for data in jax.random.key_data(keys).tolist()}) == 3


def test_fold_in_gives_each_row_its_own_number():
    keys = jax.random.split(jax.random.key(5), 3)
    folded = streams.fold_in(keys, jnp.array([7, 8, 9]))
    assert all(bool(folded[i] == jax.random.fold_in(keys[i], 7 + i)) for i in range(3))
    assert bool(jnp.all(streams.fold_in(keys, 2) == jax.vmap(lambda k: jax.random.fold_in(k, 2))(keys)))
