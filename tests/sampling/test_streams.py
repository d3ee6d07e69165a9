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
    draft, verify = (set(map(tuple, many[purpose][:, :2])) for purpose in (Purpose.DRAFT, Purpose.VERIFY))
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


def other_keys():
    """Keys of every kind that are no typed threefry key: one, and one per row."""
    for impl in ("rbg", "unsafe_rbg"):
        typed = jax.random.key(5, impl=impl)
        yield typed, jax.random.split(typed, 4)
    yield jax.random.PRNGKey(5), jax.random.key_data(jax.random.split(jax.random.key(5), 4))
    words = jax.random.key_data(jax.random.split(jax.random.key(5, impl="rbg"), 4))
    yield words[0], np.asarray(words)


@pytest.mark.parametrize("pair", list(other_keys()), ids=["rbg", "unsafe rbg", "raw threefry", "raw rbg"])
def test_keys_of_every_kind_make_threefry_keys(pair):
    one, per_row = pair
    keys = row_keys(one, 4)
    assert str(jax.random.key_impl(keys)) == "threefry2x32"
    assert bool(jnp.all(row_keys(one, 2) == keys[:2]))
    keys = row_keys(per_row, 4)
    assert len({tuple(data) for data in jax.random.key_data(keys).tolist()}) == 4
    # A row's key is made of that row's alone, in any place and batch.
    for rows in (np.array([3]), np.array([2, 0])):
        assert bool(jnp.all(row_keys(per_row[rows], len(rows)) == keys[rows]))


def test_every_word_of_a_key_counts():
    words = np.arange(4, dtype=np.uint32)
    changed = np.stack([words, *(words + (np.arange(4) == i).astype(np.uint32) for i in range(4))])
    keys = row_keys(changed, 5)
    assert len({tuple(data) for data in jax.random.key_data(keys).tolist()}) == 5


def test_raw_words_of_a_threefry_key_are_that_key():
    key = jax.random.key(7)
    assert bool(jnp.all(row_keys(jax.random.PRNGKey(7), 3) == row_keys(key, 3)))
    keys = jax.random.split(key, 3)
    assert bool(jnp.all(row_keys(jax.random.key_data(keys), 3) == keys))


def test_the_bits_of_threefry_keys_are_on_record():
    keys = row_keys(jax.random.key(42), 2)
    assert jax.random.key_data(keys).tolist() == [[1832780943, 270669613], [64467757, 2916123636]]
    assert (uniforms(keys, Purpose.VERIFY, 2) * 2**24).tolist() == [[6306506, 5155475], [11553068, 4785912]]
