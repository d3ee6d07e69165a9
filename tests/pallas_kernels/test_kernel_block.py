"""The block kernel gives the tokens of the XLA core on the same uniforms, with few blocks and with many."""

import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest

from pallas_kernels import block as block_kernel
from pallas_kernels import config as sizes
from pallas_kernels.config import Config
from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, ROUNDS, Draft, Filter, Uniforms
from specsamp_jax.rules import block, kernels

pytestmark = [pytest.mark.slow, cases.QUICK]

core = jax.jit(block.verify_block)


@pytest.fixture(params=["few blocks", "many blocks"])
def run(request, interpreted, monkeypatch):
    """The kernel with 2 blocks of 4 rounds, in eight passes, and with 4 blocks of 8, in two.

    More blocks than cores take the interpreter minutes: they wait for each other at the cluster's barrier.

    Where a launch of its own sums tiles, 2 blocks share the rows of a sequence, or each row has 2.
    """
    few = request.param == "few blocks"

    def summing(batch_size, num_rows, vocab_size):
        del batch_size, vocab_size
        return Config(2, row_parts=1 if few else num_rows)

    monkeypatch.setattr(sizes, "block_sum_config", summing)

    def run(*args):
        config = Config(2, rounds=4) if few else Config(4, rounds=8)
        with interpreted():
            return jax.block_until_ready(kernels.verify_block(*args, kernel=block_kernel.verify_block, config=config))

    return run


def check(run, args):
    got, expected = run(*args), core(*args)
    cases.assert_same(got, expected)
    return got


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "kind"),
    [(1025, jnp.float32, "logits"), (2056, jnp.bfloat16, "normalizers"), (8193, jnp.float16, "one_hot")],
)
def test_equals_xla(run, vocab_size, dtype, kind):
    check(run, cases.random_case(vocab_size, 6, 3, vocab_size, dtype=dtype, kind=kind))


def far_case(seed, batch_size, num_draft, vocab_size=1040, **options):
    """Drafts whose models differ, and large uniforms: few sequences keep all their drafts."""
    args = cases.random_case(seed, batch_size, num_draft, vocab_size, **options)
    target, target_filter, draft, draft_filter, uniforms = args
    accept = jax.random.uniform(jax.random.key(seed), uniforms.accept.shape) ** 0.5
    return target, target_filter, draft, draft_filter, uniforms._replace(accept=accept.astype(uniforms.accept.dtype))


def test_rows_that_are_tried_and_left(run):
    args = far_case(3, 12, 4)
    got = check(run, args)
    assert len(set(got.num_accepted.tolist())) > 3


@pytest.mark.parametrize("vocab_size", [1040, 1031], ids=["tiles from the first launch", "tiles summed"])
@pytest.mark.parametrize("last", [24, 64], ids=["late success", "none"])
def test_rounds_without_success(run, last, vocab_size):
    """Rounds step back to a row of P = 1 and fail there, until one succeeds or to the end; then sums of rows decide."""
    target, target_filter, draft, draft_filter, uniforms = far_case(5, 4, 3, vocab_size)
    rounds = uniforms.rounds.at[:, 0, :last].set(1 - 2.0**-24)
    args = target, target_filter, draft, draft_filter, uniforms._replace(rounds=rounds)
    got = check(run, args)
    assert (got.num_accepted < 3).any()


@pytest.mark.parametrize("kind", ["logits", "normalizers", "one_hot"])
@pytest.mark.parametrize("sampling", [cases.ALL_FILTERS, cases.GREEDY_FIRST], ids=["filters", "greedy"])
def test_equals_xla_filtered(run, kind, sampling):
    draft_sampling = None if kind == "one_hot" else sampling
    check(run, far_case(3, 3, 3, 1029, sampling=sampling, draft_sampling=draft_sampling, kind=kind))


def test_ragged_and_out_of_range(run):
    target, target_filter, draft, draft_filter, uniforms = far_case(5, 5, 3, 1025)
    tokens = draft.tokens.at[0].set(-1).at[1, 1:].set(-1).at[2, 0].set(1025).at[3, 1].set(-1).at[4, 1].set(1025)
    # What was not drafted is not read.
    logits = draft.logits.at[0].set(jnp.nan)
    got = check(run, (target, target_filter, Draft(tokens, logits), draft_filter, uniforms))
    assert got.status[2] == DEGENERATE_DRAFT


def test_degenerate_rows(run):
    target, target_filter, draft, draft_filter, uniforms = far_case(7, 6, 2, 1100)
    target = target.at[0, 0, 5].set(jnp.nan).at[1, 1, 7].set(jnp.inf).at[2, 0].set(-jnp.inf).at[3, 2, 0].set(jnp.nan)
    logits = draft.logits.at[4, 0, 3].set(jnp.nan).at[5, 1].set(-jnp.inf)
    uniforms = uniforms._replace(accept=jnp.zeros_like(uniforms.accept))
    got = check(run, (target, target_filter, Draft(draft.tokens, logits), draft_filter, uniforms))
    assert got.status.tolist() == [DEGENERATE_TARGET] * 4 + [DEGENERATE_DRAFT] * 2


def test_equal_models_accept_everything(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(10, 2, 3, 1500)
    uniforms = uniforms._replace(accept=jnp.full((2, 3), 1 - 2.0**-24))
    got = check(run, (target, target_filter, Draft(draft.tokens, target[:, :3]), draft_filter, uniforms))
    assert got.num_accepted.tolist() == [3, 3]


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_boundary_uniforms(run, u):
    # Three tokens with weight in three tiles, drafted as one of weight zero, or as one too likely.
    target = jnp.full((2, 3, 2600), -jnp.inf).at[:, :, jnp.array([9, 1100, 2599])].set(0.0)
    logits = jnp.zeros((2, 2, 2600)).at[:, :, 9].set(9.0)
    uniforms = Uniforms(jnp.full((2, 2), u), jnp.full((2, 2), u), jnp.full((2, 3, ROUNDS), u))
    got = check(run, (target, Filter(), Draft(jnp.array([[9, 10], [10, 9]]), logits), Filter(), uniforms))
    emitted = got.tokens[got.tokens >= 0]
    assert set(emitted.tolist()) <= {9, 1100, 2599}


def test_chunks_of_tiles_choose_the_token_after_all_drafts(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(13, 3, 1, 16400, dtype=jnp.bfloat16)
    uniforms = uniforms._replace(accept=jnp.zeros((3, 1)))
    check(run, (target, target_filter, draft, draft_filter, uniforms))


def test_what_the_kernel_does_not_take_is_refused():
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(1, 2, 2, 2048)
    args = target, target_filter, draft, draft_filter
    for rounds in (None, uniforms.rounds[:, :, :32]):
        with pytest.raises(NotImplementedError, match="64 rounds"):
            kernels.verify_block(*args, uniforms._replace(rounds=rounds))
    for blocks, rounds in ((4, 1), (16, 3)):
        kernel = functools.partial(kernels.verify_block, config=Config(blocks, rounds=rounds))
        with pytest.raises(ValueError, match="must divide 64"):
            jax.make_jaxpr(kernel)(*args, uniforms)
