"""The token kernel returns the XLA core's tokens on the same uniforms."""

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest

from pallas_kernels import token as token_kernel
from pallas_kernels import token_early_exit
from pallas_kernels.config import Config
from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, EMPTY_RESIDUAL, Draft, Filter, Uniforms
from specsamp_jax.rules import kernels, token

pytestmark = [pytest.mark.slow, cases.QUICK]

core = jax.jit(token.verify_token)


@pytest.fixture
def run(request, interpreted):
    """The kernel in two launches, with two blocks per sequence (or the test's number) where it is interpreted."""
    config = None if cases.ON_GPU else getattr(request, "param", Config(2))

    def run(*args):
        with interpreted():
            return jax.block_until_ready(kernels.verify_token(*args, kernel=token_kernel.verify_token, config=config))

    return run


def check(run, args):
    got, expected = run(*args), core(*args)
    cases.assert_same(got, expected)
    return got


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "kind"),
    [
        (1024, jnp.float32, "logits"),
        (2056, jnp.bfloat16, "normalizers"),
        (9001, jnp.bfloat16, "logits"),
        (8193, jnp.float16, "one_hot"),
        (16400, jnp.bfloat16, "normalizers"),
        (37, jnp.float32, "normalizers"),
    ],
)
def test_equals_xla(run, vocab_size, dtype, kind):
    check(run, cases.random_case(vocab_size, 3, 2, vocab_size, dtype=dtype, kind=kind))


@pytest.mark.parametrize("run", [Config(1), Config(3)], indirect=True)
def test_equals_xla_for_any_number_of_blocks(run):
    check(run, cases.random_case(1, 2, 2, 4097, dtype=jnp.bfloat16))


@pytest.mark.parametrize("sampling", [cases.ALL_FILTERS, cases.GREEDY_FIRST], ids=["filters", "greedy"])
@pytest.mark.parametrize("run", [Config(2, max_unrolled=1)], indirect=True)
def test_equals_xla_where_chunks_are_joined_in_a_loop(run, sampling):
    check(run, cases.random_case(2, 3, 2, 9001, sampling=sampling, draft_sampling=sampling))


@pytest.mark.parametrize("kind", ["logits", "normalizers", "one_hot"])
@pytest.mark.parametrize("sampling", [cases.ALL_FILTERS, cases.GREEDY_FIRST], ids=["filters", "greedy"])
def test_equals_xla_filtered(run, kind, sampling):
    draft_sampling = None if kind == "one_hot" else sampling
    check(run, cases.random_case(3, 3, 2, 1029, sampling=sampling, draft_sampling=draft_sampling, kind=kind))


def test_filters_of_target_alone(run):
    check(run, cases.random_case(4, 3, 2, 1040, dtype=jnp.bfloat16, sampling=cases.ALL_FILTERS))


def test_ragged_and_out_of_range(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(5, 4, 3, 1025)
    tokens = draft.tokens.at[0].set(-1).at[1, 1:].set(-1).at[2, 0].set(1025).at[3, 1].set(-1)
    # What was not drafted is not read.
    logits = draft.logits.at[0].set(jnp.nan)
    got = check(run, (target, target_filter, Draft(tokens, logits), draft_filter, uniforms))
    assert got.status.tolist() == [0, 0, DEGENERATE_DRAFT, 0]


@pytest.mark.parametrize("vocab_size", [29, 1025])
def test_a_token_beyond_the_vocabulary_has_no_probability_under_a_one_hot_draft(run, vocab_size):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(5, 3, 2, vocab_size, kind="one_hot")
    tokens = draft.tokens.at[0, 0].set(vocab_size).at[1, 0].set(2**31 - 1)
    got = check(run, (target, target_filter, Draft(tokens), draft_filter, uniforms))
    assert got.status.tolist()[:2] == [DEGENERATE_DRAFT] * 2


def test_no_drafts_at_all(run):
    target, target_filter, _, _, uniforms = cases.random_case(6, 3, 0, 1500)
    tokens = jnp.zeros((3, 0), jnp.int32)
    check(run, (target, target_filter, Draft(tokens), Filter(), uniforms))
    check(run, (target, target_filter, Draft(tokens, target[:, :0]), Filter(), uniforms))


def test_degenerate_rows(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(7, 6, 2, 1100)
    target = target.at[0, 0, 5].set(jnp.nan).at[1, 1, 7].set(jnp.inf).at[2, 0].set(-jnp.inf).at[3, 2, 0].set(jnp.nan)
    logits = draft.logits.at[4, 0, 3].set(jnp.nan).at[5, 1].set(-jnp.inf)
    uniforms = uniforms._replace(accept=jnp.zeros_like(uniforms.accept))
    got = check(run, (target, target_filter, Draft(draft.tokens, logits), draft_filter, uniforms))
    assert got.status.tolist() == [DEGENERATE_TARGET] * 4 + [DEGENERATE_DRAFT] * 2


def test_degenerate_greedy_rows(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(
        8, 3, 1, 1100, sampling=cases.GREEDY_FIRST._replace(temperature=jnp.zeros(3))
    )
    target = target.at[0, 0, 5].set(jnp.nan).at[1, 0, 7].set(jnp.inf).at[2, 0].set(-jnp.inf)
    check(run, (target, target_filter, draft, draft_filter, uniforms))


def test_greedy_ties_take_the_first(run):
    # Two equal logits that one lane sees, 512 places apart.
    target = jnp.zeros((1, 2, 1030)).at[0, :, 589].set(4.0).at[0, :, 77].set(4.0)
    for drafted, accepted in ((77, 1), (589, 0)):
        args = target, Filter(jnp.ones(1), None, jnp.array([True])), Draft(jnp.array([[drafted]])), Filter()
        got = check(run, (*args, Uniforms(jnp.full((1, 1), 0.9), jnp.full((1, 2), 0.5))))
        assert got.num_accepted.tolist() == [accepted]
        assert got.tokens[0].tolist() == [77, 77 if accepted else -1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2600, jnp.float32), (8192, jnp.bfloat16)])
def test_boundary_uniforms(run, vocab_size, dtype):
    # Three tokens with weight, in three tiles: u = 0 takes the first, u just below 1 the last.
    target = jnp.full((2, 2, vocab_size), -jnp.inf, dtype).at[:, :, jnp.array([9, 1100, 2599])].set(0.0)
    below_one = 1 - 2.0**-24
    emit = jnp.array([[0.0, 0.0], [below_one, below_one]])
    for accept in (0.0, below_one):
        uniforms = Uniforms(jnp.full((2, 1), accept), emit)
        got = check(run, (target, Filter(), Draft(jnp.array([[9], [9]])), Filter(), uniforms))
        accepted = accept < 1 / 3
        last = got.tokens[jnp.arange(2), got.num_accepted].tolist()
        assert last == ([9, 2599] if accepted else [1100, 2599])


def test_probability_zero_is_never_accepted(run):
    target = jnp.full((1, 2, 1024), -jnp.inf).at[:, :, 3].set(0.0)
    uniforms = Uniforms(jnp.zeros((1, 1)), jnp.zeros((1, 2)))
    got = check(run, (target, Filter(), Draft(jnp.array([[4]])), Filter(), uniforms))
    assert got.tokens.tolist() == [[3, -1]]


def test_empty_residual_emits_from_target(run):
    # p = q to the last bit, and a draft whose own q is overstated so that it is rejected.
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(9, 2, 1, 1300)
    target = target.at[:, 1].set(target[:, 0])
    normalizers = jax.nn.logsumexp(target[:, :1], -1) - 2.0
    uniforms = uniforms._replace(accept=jnp.full((2, 1), 0.9))
    got = check(
        run, (target, target_filter, Draft(draft.tokens, target[:, :1], None, normalizers), draft_filter, uniforms)
    )
    assert got.status.tolist() == [EMPTY_RESIDUAL] * 2


def test_equal_models_accept_everything(run):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(10, 2, 3, 1500)
    uniforms = uniforms._replace(accept=jnp.full((2, 3), 1 - 2.0**-24))
    got = check(run, (target, target_filter, Draft(draft.tokens, target[:, :3]), draft_filter, uniforms))
    assert got.num_accepted.tolist() == [3, 3]


def test_bonus_tokens_of_every_chunk(run):
    # Chunks of 8 tiles: two whole ones, and one of two elements that holds nearly all of the last sequence's mass.
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(13, 5, 1, 16400, dtype=jnp.bfloat16)
    target = target.at[4, :, 16398].set(20.0).at[4, :, 16399].set(21.0)
    emit = jnp.array([[0.01, 0.5], [0.4, 0.2], [0.9, 0.9], [1 - 2.0**-24, 1 - 2.0**-24], [0.5, 0.9]])
    uniforms = uniforms._replace(accept=jnp.zeros((5, 1)), emit=emit)
    got = check(run, (target, target_filter, Draft(draft.tokens, target[:, :1]), draft_filter, uniforms))
    assert got.num_accepted.tolist() == [1] * 5
    assert len({t // 8192 for t in got.tokens[:, 1].tolist()}) == 3


def test_residual_tokens_of_many_tiles(run):
    args = cases.random_case(15, 5, 1, 16400, dtype=jnp.bfloat16, kind="normalizers")
    emit = jnp.stack([jnp.linspace(0.05, 0.95, 5), jnp.full(5, 0.5)], axis=1)
    args = *args[:-1], args[-1]._replace(accept=jnp.full((5, 1), 1 - 2.0**-24), emit=emit)
    got = check(run, args)
    rejected = got.num_accepted == 0
    assert rejected.sum() >= 3
    assert len(set((got.tokens[:, 0] // 1024)[rejected].tolist())) >= 3


def test_an_unusable_normalizer_is_read(run):
    args = target, target_filter, draft, draft_filter, uniforms = cases.random_case(14, 3, 2, 2100, kind="normalizers")
    expected = core(*args)
    normalizers = draft.log_normalizers.at[0, 0].set(jnp.nan).at[1, 1].set(jnp.inf).at[2].set(1e6)
    args = target, target_filter, draft._replace(log_normalizers=normalizers), draft_filter, uniforms
    cases.assert_same(run(*args), expected)


@pytest.fixture
def run_early(interpreted):
    """The kernel with early exit, with two emitting blocks per sequence and `chunks` chunks per reading block."""

    def run(*args, chunks=1):
        with interpreted():
            kernel, config = token_early_exit.verify_token, Config(2, chunks=chunks)
            return jax.block_until_ready(kernels.verify_token(*args, kernel=kernel, config=config))

    return run


def check_early(run_early, args, **options):
    got, expected = run_early(*args, **options), core(*args)
    # Rows after the first rejection may not have been read, and their acceptance is 0.
    read = jnp.arange(args[2].tokens.shape[1]) <= expected.num_accepted[:, None]
    expected = expected._replace(accept_prob=jnp.where(read, expected.accept_prob, 0))
    cases.assert_same(got, expected)
    return got


@pytest.mark.parametrize("kind", ["logits", "normalizers", "one_hot"])
def test_early_exit_decides_the_same(run_early, kind):
    got = check_early(run_early, cases.random_case(11, 4, 3, 1100, kind=kind))
    assert len(set(got.num_accepted.tolist())) > 1


@pytest.mark.parametrize(("vocab_size", "chunks"), [(1500, 2), (1500, 3), (2500, 3)])
def test_early_exit_decides_the_same_with_several_chunks_per_block(run_early, vocab_size, chunks):
    got = check_early(run_early, cases.random_case(11, 4, 3, vocab_size), chunks=chunks)
    assert len(set(got.num_accepted.tolist())) > 1


def test_early_exit_accepts_everything_from_equal_models(run_early):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(10, 2, 3, 1500)
    uniforms = uniforms._replace(accept=jnp.full((2, 3), 1 - 2.0**-24))
    draft = Draft(draft.tokens, target[:, :3])
    got = check_early(run_early, (target, target_filter, draft, draft_filter, uniforms))
    assert got.num_accepted.tolist() == [3, 3]


def test_early_exit_with_every_filter(run_early):
    check_early(
        run_early, cases.random_case(3, 3, 2, 1029, sampling=cases.ALL_FILTERS, draft_sampling=cases.ALL_FILTERS)
    )
    check_early(
        run_early, cases.random_case(3, 3, 2, 1029, sampling=cases.GREEDY_FIRST, draft_sampling=cases.GREEDY_FIRST)
    )


def test_early_exit_of_ragged_and_degenerate_rows(run_early):
    target, target_filter, draft, draft_filter, uniforms = cases.random_case(12, 5, 2, 1025, kind="normalizers")
    tokens = draft.tokens.at[0].set(-1).at[1, 1].set(-1).at[2, 0].set(1025)
    target = target.at[3, 0, 5].set(jnp.nan).at[4, 2, 7].set(jnp.inf)
    # One normalizer cannot be used, so that its row is read.
    normalizers = draft.log_normalizers.at[4, 1].set(jnp.nan)
    draft = Draft(tokens, draft.logits, None, normalizers)
    uniforms = uniforms._replace(accept=jnp.zeros_like(uniforms.accept))
    got = check_early(run_early, (target, target_filter, draft, draft_filter, uniforms))
    assert got.status.tolist() == [0, 0, DEGENERATE_DRAFT, DEGENERATE_TARGET, DEGENERATE_TARGET]


@pytest.mark.skipif(cases.ON_GPU, reason="races are found by the interpreter")
def test_no_block_reads_what_another_may_not_have_written(interpreted):
    args = cases.random_case(1, 1, 3, 2100)
    args = *args[:-1], args[-1]._replace(accept=jnp.zeros((1, 3)))
    # Raises at a race.
    with interpreted(detect_races=True):
        got = kernels.verify_token(*args, kernel=token_kernel.verify_token, config=Config(2))
        got = jax.block_until_ready(got)
    assert got.tokens.tolist() == token.verify_token(*args).tokens.tolist()
    assert got.num_accepted.tolist() == [3]
