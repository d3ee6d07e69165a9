"""The sigmoid kernel returns the XLA core's tokens on the same uniforms."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest

from pallas_kernels.config import Config
from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, Draft, Filter, Uniforms
from specsamp_jax.rules import kernels, sigmoid

pytestmark = [pytest.mark.slow, cases.QUICK]


@pytest.fixture
def check(interpreted):
    config = None if cases.ON_GPU else Config(2)

    def check(args, alpha=-1e4, beta=1e4):
        with interpreted():
            got = jax.block_until_ready(kernels.verify_sigmoid(*args, alpha=alpha, beta=beta, config=config))
        expected = jax.jit(functools.partial(sigmoid.verify_sigmoid, alpha=alpha, beta=beta))(*args)
        cases.assert_same(got, expected)
        return got

    return check


@pytest.mark.parametrize(("alpha", "beta"), [(-1e4, 1e4), (-5.0, 5.0), (12.0, 13.0)])
def test_equals_xla(check, alpha, beta):
    check(cases.random_case(1, 3, 2, 2051, dtype=jnp.bfloat16), alpha, beta)


def test_equals_xla_filtered(check):
    args = cases.random_case(2, 3, 2, 1040, sampling=cases.ALL_FILTERS, draft_sampling=cases.GREEDY_FIRST)
    check((args[0], args[1]._replace(greedy=None), *args[2:]), 4.0, 5.0)


def test_equals_xla_one_hot(check):
    check(cases.random_case(3, 3, 2, 1025, kind="one_hot"), 4.0, 5.0)


@pytest.mark.parametrize("vocab_size", [29, 1025])
@pytest.mark.parametrize("kind", ["one_hot", "logits"])
def test_a_token_beyond_the_vocabulary_makes_the_draft_degenerate(check, vocab_size, kind):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(5, 2, 1, vocab_size, kind=kind)
    draft = draft._replace(tokens=draft.tokens.at[0, 0].set(vocab_size))
    got = check((target, target_filter, draft, draft_filter, uniforms), 4.0, 5.0)
    assert got.status.tolist() == [DEGENERATE_DRAFT, 0]


def test_no_drafts_at_all(check):
    target, target_filter, _, _, uniforms = cases.random_case(6, 3, 0, 1500)
    check((target, target_filter, Draft(jnp.zeros((3, 0), jnp.int32)), Filter(), uniforms))


def test_ragged_and_degenerate(check):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(7, 6, 2, 1100)
    tokens = draft.tokens.at[0].set(-1).at[1, 1].set(-1).at[2, 0].set(1100)
    # Steep sigmoids and u just below 1: drafts are rejected.
    uniforms = uniforms._replace(accept=jnp.full((6, 2), 0.99))
    target = target.at[3, :, 5].set(jnp.inf).at[4].set(-jnp.inf)
    logits = draft.logits.at[5, :, 3].set(jnp.inf)
    got = check((target, target_filter, Draft(tokens, logits), draft_filter, uniforms), 12.0, 13.0)
    assert got.status[3] == DEGENERATE_TARGET
    assert got.status[4] == DEGENERATE_TARGET
    assert got.status[5] == DEGENERATE_DRAFT


def test_not_a_number(interpreted):
    # By hand: XLA's maximum of many rows forgets a NaN on CPUs, so that the core does not say what is right.
    target = jnp.zeros((1, 1, 1100)).at[0, 0, 5].set(jnp.nan).at[0, 0, 102].set(1.0)
    uniforms = Uniforms(jnp.zeros((1, 0)), jnp.full((1, 2), 0.5))
    with interpreted():
        got = kernels.verify_sigmoid(
            target, Filter(), Draft(jnp.zeros((1, 0), jnp.int32)), Filter(), uniforms, alpha=-1e4, beta=1e4
        )
    assert got.tokens.tolist() == [[102]]
    assert got.status.tolist() == [DEGENERATE_TARGET]


@pytest.mark.parametrize(
    ("lowest", "alpha", "beta"), [(float(jnp.finfo(jnp.float32).min), -1e4, 1e4), (-1e4, 10.0, 11.0)]
)
def test_a_logit_masked_by_a_number_leaves_a_residual(check, lowest, alpha, beta):
    target = jnp.zeros((1, 2, 1024)).at[0, 0, :3].set(4.0).at[0, 0, 5].set(lowest)
    logits = jnp.zeros((1, 1, 1024)).at[0, 0, 10].set(6.0).at[0, 0, 5].set(2.0)
    uniforms = Uniforms(jnp.full((1, 1), 1 - 2.0**-24), jnp.full((1, 2), 0.5))
    args = target, Filter(), Draft(jnp.array([[10]]), logits), Filter(), uniforms
    assert check(args, alpha, beta).tokens.tolist() == [[1, -1]]


@pytest.mark.parametrize(("alpha", "status"), [(0.0, DEGENERATE_TARGET), (-200.0, 0)])
def test_scores_that_all_underflow_make_the_row_degenerate(check, alpha, status):
    target = jnp.full((2, 2, 1100), -300.0).at[:, :, 1030].set(-200.0).at[1, 0].set(alpha)
    tokens = jnp.array([[-1], [1030]])
    uniforms = Uniforms(jnp.zeros((2, 1)), jnp.full((2, 2), 0.5))
    got = check((target, Filter(), Draft(tokens), Filter(), uniforms), alpha, alpha + 1)
    assert got.tokens.tolist() == [[1030, -1], [1030, 1030]]
    assert got.status.tolist() == [status, status]
