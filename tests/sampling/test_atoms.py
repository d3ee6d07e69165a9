"""The atoms: pure functions of logits."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import scipy.special

import specsamp_jax as ss

INF = np.inf
SHAPE = (2, 3, 11)


def random_pair(seed=0, shape=SHAPE, scale=3):
    rng = np.random.default_rng(seed)
    target, draft = (rng.normal(size=shape).astype(np.float32) * scale for _ in range(2))
    target[..., 1] = -INF
    draft[..., 2] = -INF
    return target, draft


def rows_of(*arrays):
    return zip(*(np.asarray(a, np.float64).reshape(-1, SHAPE[-1]) for a in arrays), strict=True)


accept_prob = jax.jit(ss.accept_prob)
residual_logits = jax.jit(ss.residual_logits)
acceptance_rate = jax.jit(ss.acceptance_rate)
expected_num_tokens = jax.jit(ss.expected_num_tokens)


def test_accept_prob_agrees_with_the_oracle_for_every_token():
    target, draft = random_pair()
    result = [np.asarray(accept_prob(target, draft, jnp.full(SHAPE[:-1], x))).reshape(-1) for x in range(SHAPE[-1])]
    for i, (z_p, z_q) in enumerate(rows_of(target, draft)):
        p, q = oracle.distribution(z_p), oracle.distribution(z_q)
        for x in range(SHAPE[-1]):
            expected = oracle.accept_probs(np.stack([p, p]), q[None], np.array([x]))[0]
            np.testing.assert_allclose(result[x][i], expected, rtol=1e-5)


def test_accept_prob_where_something_is_zero():
    half = np.log(0.5)
    # p is 0 at tokens 0 and 2, q at 1 and 2; the last row is as good as uniform.
    target, draft = (
        np.array([row] * 7 + [[-70.0] * 4]) for row in ([-INF, half, -INF, half], [half, -INF, -INF, half])
    )
    tokens = jnp.array([0, 1, 2, 3, -1, 4, 100, 0])
    assert accept_prob(target, draft, tokens).tolist() == [0, 1, 0, 1, 0, 0, 0, 1]


def test_residual_logits_agree_with_the_oracle():
    target, draft = random_pair(1)
    for z_p, z_q, log_residual in rows_of(target, draft, residual_logits(target, draft)):
        p, q = oracle.distribution(z_p), oracle.distribution(z_q)
        np.testing.assert_allclose(np.exp(log_residual), np.maximum(p - q, 0), rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(scipy.special.softmax(log_residual), oracle.residual(p, q), rtol=1e-4, atol=1e-7)


def test_residual_logits_keep_the_digits_of_tiny_probabilities():
    # p = 1.5e-20 and q = 1e-20 at token 0: their difference has no digit in 1 - (1 - p) style arithmetic.
    target = jnp.log(jnp.array([1.5e-20, 0.5, 0.5]))
    draft = jnp.log(jnp.array([1e-20, 0.25, 0.75]))
    np.testing.assert_allclose(residual_logits(target, draft)[:2], np.log([0.5e-20, 0.25]), rtol=1e-5)
    assert residual_logits(target, draft)[2] == -INF


def test_equal_models_have_no_residual_and_accept_everything():
    target, _ = random_pair(2)
    assert np.all(residual_logits(target, target) == -INF)
    np.testing.assert_allclose(acceptance_rate(target, target), 1, rtol=1e-6)
    assert np.all(accept_prob(target, target, jnp.zeros(SHAPE[:-1], int)) == 1)
    assert not np.any(accept_prob(target, target, jnp.ones(SHAPE[:-1], int)))


def test_shifted_logits_change_nothing():
    target, draft = (np.round(z * 8) / 8 for z in random_pair(3))
    tokens = jnp.zeros(SHAPE[:-1], int)
    for plain, shifted in (
        (residual_logits(target, draft), residual_logits(target + 64, draft - 32)),
        (acceptance_rate(target, draft), acceptance_rate(target + 64, draft - 32)),
        (accept_prob(target, draft, tokens), accept_prob(target + 64, draft - 32, tokens)),
    ):
        np.testing.assert_allclose(plain, shifted, rtol=1e-5)


def test_the_residual_has_finite_gradients():
    target, draft = random_pair(4)

    def residual_mass(target, draft):
        return jnp.exp(ss.residual_logits(target, draft)).sum()

    for gradient in jax.jit(jax.grad(residual_mass, argnums=(0, 1)))(target, draft):
        assert np.all(np.isfinite(gradient))
        assert np.any(gradient != 0)


def test_acceptance_rate_agrees_with_the_oracle():
    target, draft = random_pair(5)
    rates = np.asarray(acceptance_rate(target, draft)).reshape(-1)
    for rate, (z_p, z_q) in zip(rates, rows_of(target, draft), strict=True):
        p, q = oracle.distribution(z_p), oracle.distribution(z_q)
        np.testing.assert_allclose(rate, oracle.acceptance_rate(p, q), rtol=1e-5)
        # Leviathan et al., corollary 3.6, and what the atoms say together: E_q[accept] = rate, sum residual = 1 - rate.
        np.testing.assert_allclose(rate, 1 - np.abs(p - q).sum() / 2, rtol=1e-5)


@pytest.mark.parametrize("num_draft", [0, 1, 4, 16])
def test_expected_num_tokens_agrees_with_the_oracle(num_draft):
    rates = np.array([0, 1e-8, 0.1, 0.5, 0.9, 0.99, 0.9999, 0.999999, 1 - 2.0**-24, 1], np.float32)
    expected = [oracle.expected_num_tokens(float(rate), num_draft) for rate in rates]
    np.testing.assert_allclose(expected_num_tokens(rates, num_draft), expected, rtol=1e-6)


def test_expected_num_tokens_of_numbers_is_a_float():
    assert ss.expected_num_tokens(1, 4).dtype == jnp.float32
    assert float(ss.expected_num_tokens(1, 4)) == 5
    np.testing.assert_allclose(ss.expected_num_tokens(0.5, jnp.array([1, 2])), [1.5, 1.75], rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("bfloat16", "float32"), ("float16", "float32"), ("float64", "float64")]
)
def test_the_arithmetic_is_float32_or_wider(dtype, expected):
    with jax.enable_x64(dtype == "float64"):
        target, draft = (jnp.asarray(z, dtype) for z in random_pair(6))
        tokens = jnp.zeros(SHAPE[:-1], int)
        rtol = 1e-12 if dtype == "float64" else 1e-4
        rates = acceptance_rate(target, draft)
        assert (
            rates.dtype == residual_logits(target, draft).dtype == accept_prob(target, draft, tokens).dtype == expected
        )
        for rate, (z_p, z_q) in zip(np.asarray(rates).reshape(-1), rows_of(target, draft), strict=True):
            p, q = oracle.distribution(z_p), oracle.distribution(z_q)
            np.testing.assert_allclose(rate, oracle.acceptance_rate(p, q), rtol=rtol)


def test_one_row_needs_no_batch():
    target, draft = (z[0, 0] for z in random_pair(7))
    assert acceptance_rate(target, draft).shape == ()
    assert residual_logits(target, draft).shape == (SHAPE[-1],)
    assert accept_prob(target, draft, jnp.int32(3)).shape == ()


def test_tokens_that_both_models_mask_make_no_nan():
    """`jax_debug_nans` looks at each operation of a call without `jit`."""
    logits = jnp.array([0.0, 1.0, -INF])
    with jax.debug_nans(True):
        assert ss.accept_prob(logits, -logits.at[2].set(INF), jnp.array(2)) == 0
        assert ss.residual_logits(logits, jnp.array([1.0, 0.0, -INF]))[2] == -INF
