"""The block kernel gives the tokens of the XLA core on the same uniforms, with blocks for each row and for all rows."""

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest

from pallas_kernels import block as block_kernel
from pallas_kernels.config import Config
from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, Draft, Filter, Uniforms
from specsamp_jax.rules import block, kernels

pytestmark = [pytest.mark.slow, cases.QUICK]

core = jax.jit(block.verify_block)


@pytest.fixture(params=["apart", "together"])
def run(request, interpreted):
    """The kernel with two blocks for each row, and with two for all rows of a sequence."""

    def run(*args):
        config = Config(2, row_parts=args[0].shape[1] if request.param == "apart" else 1)
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
    """Drafts whose models differ, so that several rows are tried, with uniforms near the probabilities of stopping."""
    args = cases.random_case(seed, batch_size, num_draft, vocab_size, **options)
    target, target_filter, draft, draft_filter, uniforms = args
    accept = jax.random.uniform(jax.random.key(seed), uniforms.accept.shape) ** 0.5
    return target, target_filter, draft, draft_filter, uniforms._replace(accept=accept.astype(uniforms.accept.dtype))


def num_tried(args):
    """Rows of each sequence at which `u < P`, though the sequence does not stop there."""
    got = core(*args)
    joint = np.ones(got.num_accepted.shape)
    tried = np.zeros(got.num_accepted.shape, int)
    target, _, draft, _, uniforms = args
    log_p, log_q = (
        np.asarray(jnp.take_along_axis(jax.nn.log_softmax(x), draft.tokens[..., None], -1)[..., 0])
        for x in (target[:, :-1], draft.logits)
    )
    for i in range(draft.tokens.shape[1]):
        joint = np.minimum(joint * np.exp(log_p[:, i] - log_q[:, i]), 1)
        tried += (uniforms.accept[:, i] < joint) & (np.asarray(got.num_accepted) < i + 1)
    return tried


def test_rows_that_are_tried_and_left(run):
    args = far_case(3, 12, 4)
    got = check(run, args)
    assert num_tried(args).max() >= 1
    assert len(set(got.num_accepted.tolist())) > 2


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
    uniforms = Uniforms(jnp.full((2, 2), u), jnp.full((2, 2), u))
    got = check(run, (target, Filter(), Draft(jnp.array([[9, 10], [10, 9]]), logits), Filter(), uniforms))
    emitted = got.tokens[got.tokens >= 0]
    assert set(emitted.tolist()) <= {9, 1100, 2599}


def test_chunks_of_tiles_choose_the_token_after_all_drafts(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(13, 3, 1, 16400, dtype=jnp.bfloat16)
    uniforms = uniforms._replace(accept=jnp.zeros((3, 1)))
    check(run, (target, target_filter, draft, draft_filter, uniforms))
