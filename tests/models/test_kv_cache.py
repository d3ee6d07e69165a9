import jax.numpy as jnp
import numpy as np
import pytest

from specsamp_jax.models.cache import CacheSpec, causal_mask, write_positions

pytestmark = pytest.mark.optimised(False)


def test_write_by_hand():
    slots = jnp.arange(10.0).reshape(2, 5)
    new = jnp.array([[10.0, 11.0, 12.0], [20.0, 21.0, 22.0]])
    positions = jnp.array([[1, 0, 4], [3, 5, -1]])
    np.testing.assert_array_equal(
        write_positions(slots, new, positions), [[11.0, 10.0, 2.0, 3.0, 12.0], [5.0, 6.0, 7.0, 20.0, 9.0]]
    )


@pytest.mark.parametrize("shape", [(), (3,), (3, 2)])
def test_write_against_a_loop(shape):
    rng = np.random.default_rng(0)
    slots, new = rng.normal(size=(4, 9, *shape)), rng.normal(size=(4, 6, *shape))
    positions = np.stack([rng.permutation(np.arange(-3, 12))[:6] for _ in range(4)])
    expected = slots.astype(np.float32)
    for row in range(4):
        for t in range(6):
            if 0 <= positions[row, t] < 9:
                expected[row, positions[row, t]] = new[row, t]
    written = write_positions(jnp.asarray(slots, jnp.float32), jnp.asarray(new, jnp.float32), jnp.asarray(positions))
    np.testing.assert_array_equal(written, expected)


def test_write_keeps_the_slots_dtype():
    written = write_positions(jnp.zeros((1, 2), jnp.bfloat16), jnp.ones((1, 1), jnp.float32), jnp.array([[1]]))
    assert written.dtype == jnp.bfloat16


def test_mask_by_hand():
    mask = causal_mask(jnp.array([[0, 2], [3, -1]]), 4)
    expected = [[[1, 0, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    np.testing.assert_array_equal(mask, np.array(expected, bool))


def test_specs_of_equal_sizes_are_equal():
    spec = CacheSpec(num_layers=2, num_kv_heads=3, head_dim=4, dtype=jnp.dtype("bfloat16"))
    again = CacheSpec(num_layers=2, num_kv_heads=3, head_dim=4, dtype=jnp.dtype("bfloat16"))
    assert spec == again
    assert hash(spec) == hash(again)
    cache = spec(5, 7)
    assert len(cache) == 2
    assert {x.shape for layer in cache for x in layer} == {(5, 7, 3, 4)}
    assert {x.dtype for layer in cache for x in layer} == {jnp.dtype("bfloat16")}
