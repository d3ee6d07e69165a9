"""`sample` as a kernel draws the XLA core's tokens from the same key."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

import specsamp_jax as ss
from pallas_kernels import config, random, slices
from specsamp_jax.sampling import kernels, streams

pytestmark = [pytest.mark.slow, cases.QUICK]

SAMPLING = ss.SamplingParams(
    temperature=jnp.array([0.7, 1.0, 0.0, 1.3, 1.0, 0.7]),
    top_k=jnp.array([20, 0, 5, 300, 50, 0]),
    top_p=jnp.array([0.8, 0.9, 1.0, 1.0, 0.95, 1.0]),
    min_p=jnp.array([0.0, 0.0, 0.0, 0.02, 0.0, 0.1]),
)


def rolled_threefry(key, count):
    """JAX's own, in loops: XLA's CPU backend compiles the kernel's unrolled rounds for minutes."""
    return tuple(threefry2x32_p.bind(*jnp.broadcast_arrays(*key, *count)))


@pytest.fixture
def check(request, interpreted, monkeypatch):
    """Holds the kernel against the core, with as many blocks per row as the test says where it is interpreted."""
    blocks = getattr(request, "param", 2)
    if not cases.ON_GPU:
        monkeypatch.setattr(random, "threefry", rolled_threefry)
        monkeypatch.setattr(slices, "num_blocks", lambda *shape: blocks)

    def check(key, logits, sampling=None):
        with interpreted():
            tokens, normalizers = jax.block_until_ready(
                kernels.sample(streams.words(key, logits.shape[0]), logits, sampling)
            )
        expected, expected_normalizers = ss.sample(key, logits, sampling)
        np.testing.assert_array_equal(tokens, expected)
        finite = np.isfinite(expected_normalizers)
        np.testing.assert_array_equal(np.isfinite(normalizers), finite)
        np.testing.assert_allclose(normalizers[finite], expected_normalizers[finite], rtol=3e-6, atol=3e-6)
        return tokens

    return check


def normal(seed, vocab_size, dtype=jnp.float32, batch_size=6):
    return (3 * jax.random.normal(jax.random.key(seed), (batch_size, vocab_size))).astype(dtype)


@pytest.mark.parametrize("check", [1, 2, 4], indirect=True)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(2056, jnp.bfloat16), (4097, jnp.float32), (37, jnp.float16)])
def test_equals_xla(check, vocab_size, dtype):
    check(jax.random.key(0), normal(0, vocab_size, dtype))


@pytest.mark.parametrize("check", [1, 2], indirect=True)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(2056, jnp.bfloat16), (3001, jnp.float32)])
def test_equals_xla_filtered(check, vocab_size, dtype):
    check(jax.random.key(1), normal(1, vocab_size, dtype), SAMPLING)


@pytest.mark.parametrize(
    "sampling",
    [
        ss.SamplingParams(0.7, 20, 0.8),
        ss.SamplingParams(temperature=0.0),
        ss.SamplingParams(top_p=0.9),
        ss.SamplingParams(2.0),
    ],
)
def test_numbers_and_one_key_per_row(check, sampling):
    check(jax.random.split(jax.random.key(2), 6), normal(2, 2100, jnp.bfloat16), sampling)


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["plain", "filtered"])
def test_degenerate_rows_beside_healthy_ones(check, sampling):
    logits = normal(3, 2100).at[0, 7].set(jnp.nan).at[1, 2000].set(jnp.inf).at[2].set(-jnp.inf).at[3].set(jnp.nan)
    tokens = check(jax.random.key(3), logits, sampling)
    assert tokens[1:4].tolist() == [2000, 0, 0]


def test_weight_in_few_places(check):
    logits = jnp.full((6, 3000), -jnp.inf).at[:, jnp.array([9, 1100, 2999])].set(0.0)
    check(jax.random.key(4), logits)
    check(jax.random.key(4), logits, SAMPLING)


@pytest.mark.parametrize(
    ("sampling", "launches"),
    [(None, 2), (ss.SamplingParams(0.7, 20, 0.8), 1), (SAMPLING, 1)],
    ids=["plain", "numbers", "arrays"],
)
def test_few_launches_and_nothing_else(sampling, launches):
    args = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((6, 151936), jnp.bfloat16)
    step = jax.jit(functools.partial(ss.sample, sampling=sampling))
    text = step.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == launches
    assert not any(word in text for word in ("stablehlo.while", "stablehlo.sort", "stablehlo.reduce", "stablehlo.exp"))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "tiles"),
    [
        (4104, jnp.bfloat16, 2),
        (4097, jnp.float32, 2),
        (37, jnp.float16, 2),
        (3076, jnp.float32, 4),
        (8200, jnp.float16, 4),
    ],
)
def test_two_launches_equal_xla(check, monkeypatch, vocab_size, dtype, tiles, temperature):
    """Rows without filters, which begin at a vector or fill the GPU."""
    monkeypatch.setattr(config, "samples_in_two_launches", lambda *shape: True)
    monkeypatch.setattr(config, "sample_tiles", lambda batch_size: tiles)
    logits = normal(9, vocab_size, dtype).at[1, 5].set(jnp.nan).at[2].set(-jnp.inf).at[3, 1:].set(-jnp.inf)
    check(jax.random.key(10), logits.at[4].set(1.0), ss.SamplingParams(temperature))
    check(jax.random.split(jax.random.key(11), 6), logits, ss.SamplingParams(temperature))


@pytest.mark.parametrize("check", [1, 2], indirect=True)
@pytest.mark.parametrize(
    "sampling",
    [
        ss.SamplingParams(0.7, 20, 0.8),
        ss.SamplingParams(SAMPLING.temperature, 5, SAMPLING.top_p, SAMPLING.min_p),
    ],
    ids=["numbers", "arrays"],
)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(2056, jnp.bfloat16), (3001, jnp.float32)])
def test_lists_of_a_launch_of_their_own(check, monkeypatch, vocab_size, dtype, sampling):
    monkeypatch.setattr(config, "lists_first", lambda num_blocks: True)
    logits = normal(1, vocab_size, dtype).at[4, 7].set(jnp.nan).at[5].set(0)
    tokens = check(jax.random.key(5), logits, sampling)
    assert tokens[4] == jnp.nanargmax(logits[4].astype(jnp.float32))


@pytest.mark.parametrize("check", [2], indirect=True)
def test_a_top_k_that_lists_do_not_hold(check):
    check(jax.random.key(6), normal(2, 2056, jnp.bfloat16), ss.SamplingParams(0.7, 100, 0.9))
