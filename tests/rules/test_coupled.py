"""The coupled rule: the law of its samples, its oracle, agreement with coupled drafts, and refusals elsewhere."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import quick_jit

import specsamp_jax as ss
from specsamp_jax._types import Filter
from specsamp_jax.rules import coupled
from specsamp_jax.sampling import gumbel, streams

FALSE_ALARM = 1e-4
B, K, V = 32, 2, 1500
coupled_step, coupled_sample = quick_jit(ss.verify_coupled), quick_jit(ss.sample_coupled)


def drawn_noise(keys, positions):
    """The noise `[B, K + 1, V]` of the public functions; the second tile begins where it ends with the vocabulary."""
    keys = gumbel.noise_keys(keys, jnp.asarray(positions), K + 1)
    first, last = (gumbel.noise(keys, tile, gumbel.TILE) for tile in range(2))
    return np.asarray(jnp.concatenate([first, last[..., 2 * gumbel.TILE - V :]], -1), np.float64)


def random_batch(seed=0, vocab_size=V):
    """Logits of the target, and coupled drafts at the positions of the rows."""
    rng = np.random.default_rng(seed)
    target = (rng.normal(size=(B, K + 1, vocab_size)) * 3).astype("f")
    logits = (target[:, :K] + 0.5 * rng.normal(size=(B, K, vocab_size))).astype("f")
    keys, positions = jax.random.split(jax.random.key(seed), B), rng.integers(0, 500, B)
    return keys, positions, target, logits


def rows(temperature=1.0):
    """One temperature per row, so that one program serves all of them."""
    return np.broadcast_to(np.float32(temperature), B)


@quick_jit
def draft_and_verify(keys, positions, target, logits, temperature, shown, *min_p):
    """A step whose drafts have the noise of the target; -1 where `shown` is False."""
    at = (positions[:, None] + jnp.arange(K)).ravel()
    many_keys, many = jax.tree.map(lambda x: jnp.repeat(x, K, axis=0), (keys, temperature))
    # An array that is absent, not 0, so that the program without it has no search of cutoffs.
    filters = {"min_p": min_p[0]} if min_p else {}
    many = ss.SamplingParams(many, **filters)
    tokens, log_normalizers = ss.sample_coupled(many_keys, logits.reshape(-1, V), many, positions=at)
    tokens = jnp.where(shown, tokens.reshape(-1, K), -1)
    sampling = ss.SamplingParams(temperature, **filters)
    draft = ss.Draft(tokens, logits, sampling, log_normalizers.reshape(-1, K), ss.CoupledNoise())
    return tokens, ss.verify_coupled(keys, target, draft, sampling, positions=positions)


ALL = np.ones((B, K), bool)


# The law, by enumeration of all noise on a grid


def exponential_grid(num_values):
    """Gumbel values of equal probability: those of the middles of `num_values` parts of the exponential law."""
    return -np.log(-np.log1p(-(np.arange(num_values) + 0.5) / num_values))


def with_noise(noise, target, tokens):
    """The core on chosen noise `[B, R, V]`; all rows have the logits `target` `[R, V]`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gumbel, "noise", lambda keys, tile, num_tokens: jnp.asarray(noise, jnp.float32))

        @quick_jit
        def rule(tokens):
            batch = jnp.broadcast_to(jnp.asarray(target, jnp.float32), noise.shape)
            keys = streams.row_keys(jax.random.key(0), len(noise))
            keys = gumbel.noise_keys(keys, jnp.zeros(len(noise), int), target.shape[0])
            return coupled.verify_coupled(batch, Filter(), ss.Draft(tokens), Filter(), keys)

        return rule(tokens)


@pytest.mark.parametrize(("vocab", "num_values"), [(3, 20), (4, 9)])
def test_the_first_token_has_the_law_p(vocab, num_values):
    p = np.random.default_rng(vocab).dirichlet(np.ones(vocab))
    noise = np.array(list(itertools.product(exponential_grid(num_values), repeat=vocab)))[:, None]
    tokens = with_noise(noise, np.log(p)[None], np.zeros((len(noise), 0), int)).tokens[:, 0]
    # Ties of equal noise fall on the grid's diagonal, which shrinks with it.
    np.testing.assert_allclose(np.bincount(tokens, minlength=vocab) / len(noise), p, atol=1 / num_values)


@pytest.mark.parametrize("drafter", ["coupled", "constant", "adversary"])
def test_the_second_token_has_its_own_law_whatever_was_drafted(drafter):
    p, q = np.random.default_rng(0).dirichlet(np.ones(3), 2), np.array([0.2, 0.5, 0.3])
    values = exponential_grid(6)
    noise = np.array(list(itertools.product(values, repeat=6))).reshape(-1, 2, 3)
    samples = (np.log(p) + noise).argmax(-1)
    drafts = {
        "coupled": (np.log(q) + noise[:, 0]).argmax(-1),
        "constant": np.zeros(len(noise), int),
        # Looks at the noise of the next position too.
        "adversary": np.where(samples[:, 1] == 0, samples[:, 0], (samples[:, 0] + 1) % 3),
    }[drafter]
    result = with_noise(noise, np.log(p), drafts[:, None])
    tokens, accepted = np.asarray(result.tokens), np.asarray(result.num_accepted)
    np.testing.assert_array_equal(tokens[:, 0], samples[:, 0])
    np.testing.assert_array_equal(accepted, drafts == samples[:, 0])
    if drafter == "adversary":
        return
    second = np.bincount(samples[:, 1], minlength=3) / len(samples)
    for first in set(tokens[accepted == 1, 0].tolist()):
        emitted = tokens[(accepted == 1) & (tokens[:, 0] == first), 1]
        np.testing.assert_allclose(np.bincount(emitted, minlength=3) / len(emitted), second, atol=1e-12)


# Drawn noise


def test_drawn_tokens_follow_the_law():
    num_draws, logits = 3_000, np.random.default_rng(1).normal(size=V).astype("f") * 3
    tokens = coupled_sample(jax.random.key(0), jnp.broadcast_to(logits, (num_draws, V)))[0]
    counts = np.bincount(tokens, minlength=V)
    assert oracle.chi_square(counts, oracle.distribution(logits.astype(float))) > FALSE_ALARM
    assert 0 < counts[gumbel.TILE :].sum() < num_draws


def test_coupled_drafts_are_accepted_as_often_as_the_paper_says():
    num_draws, rng = 20_000, np.random.default_rng(2)
    for seed in range(3):
        p, q = rng.dirichlet(np.full(6, 0.5), 2)
        target, logits = (jnp.broadcast_to(jnp.log(jnp.asarray(x, jnp.float32)), (num_draws, 6)) for x in (p, q))
        key = jax.random.key(seed)
        tokens = coupled_sample(key, logits, positions=7)[0][:, None]
        draft = ss.Draft(tokens, logits[:, None], noise=ss.CoupledNoise())
        share = coupled_step(key, jnp.stack([target] * 2, 1), draft, positions=7).num_accepted.mean()
        expected, distance = oracle.coupled_acceptance(p, q), np.abs(p - q).sum() / 2
        assert (1 - distance) / (1 + distance) <= expected <= 1 - distance
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / num_draws)


@pytest.mark.parametrize("kind", ["soft", "ragged", pytest.param("filtered", marks=pytest.mark.slow)])
def test_random_rows_agree_with_the_oracle(kind):
    keys, positions, target, logits = random_batch()
    setting = {"temperature": 0.8, "min_p": 0.05} if kind == "filtered" else {"temperature": 0.9}
    shown = np.random.default_rng(3).random((B, K)) < 0.7 if kind == "ragged" else ALL
    tokens, result = draft_and_verify(
        keys, positions, target, logits, rows(setting["temperature"]), shown, *([0.05] if kind == "filtered" else [])
    )
    p = np.array([[oracle.distribution(row.astype(float), **setting) for row in each] for each in target])
    noise = drawn_noise(keys, positions)
    lengths = set()
    for row in range(B):
        drafted = tokens[row, : int(np.cumprod(tokens[row] >= 0).sum())].tolist()
        want = oracle.coupled_text(p[row], noise[row], drafted)
        lengths.add(len(want))
        assert result.tokens[row].tolist() == want + [-1] * (K + 1 - len(want))
        assert result.num_accepted[row] == len(want) - 1
        log_probs = np.log([p[row, i, token] for i, token in enumerate(want)])
        np.testing.assert_allclose(result.log_probs[row, : len(want)], log_probs, rtol=1e-4, atol=1e-5)
    assert lengths == {1, 2, 3}
    assert not result.status.any()


def test_a_row_depends_on_its_key_and_position_alone():
    batch = (*random_batch(), rows(), ALL)
    tokens, whole = draft_and_verify(*batch)
    order = np.random.default_rng(0).permutation(B)
    for some in (order, order[:3]):  # another index; another batch size
        part_tokens, part = draft_and_verify(*jax.tree.map(lambda x, some=some: x[some], batch))
        np.testing.assert_array_equal(part_tokens, tokens[some])
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, np.asarray(b)[some])


def test_samples_do_not_depend_on_the_drafts_or_on_where_a_step_begins():
    keys, positions, target, logits = random_batch()
    _, first = draft_and_verify(keys, positions, target, logits, rows(), ALL)
    # The step that begins one position later, without drafts.
    _, later = draft_and_verify(keys, positions + 1, np.roll(target, -1, 1), logits, rows(), ~ALL)
    kept = np.asarray(first.num_accepted) > 0
    np.testing.assert_array_equal(later.tokens[kept, 0], first.tokens[kept, 1])
    _, elsewhere = draft_and_verify(keys, positions + 1, target, logits, rows(), ALL)
    assert (elsewhere.tokens[:, 0] != first.tokens[:, 0]).any()
    assert kept.any()
    assert not later.num_accepted.any()


@pytest.mark.slow
def test_bfloat16_logits_are_what_they_are_in_float32():
    keys, positions, target, _ = random_batch()
    narrow = jnp.asarray(target[:, 0], jnp.bfloat16)
    results = [coupled_sample(keys, z, positions=positions) for z in (narrow, narrow.astype(jnp.float32))]
    np.testing.assert_array_equal(results[0][0], results[1][0])
    np.testing.assert_allclose(results[0][1], results[1][1], rtol=1e-6)
    assert results[0][1].dtype == jnp.float32


# Edges


def test_greedy_rows_emit_the_largest_logits_beside_sampled_rows():
    keys, positions, target, _ = random_batch()
    greedy = np.arange(B) % 2 == 0
    tokens, result = draft_and_verify(keys, positions, target, target[:, :K], rows(np.where(greedy, 0, 1)), ALL)
    _, plain = draft_and_verify(keys, positions, target, target[:, :K], rows(), ALL)
    np.testing.assert_array_equal(tokens[greedy], target.argmax(-1)[greedy, :K])
    np.testing.assert_array_equal(result.tokens[greedy], target.argmax(-1)[greedy])
    np.testing.assert_array_equal(result.tokens[~greedy], plain.tokens[~greedy])
    # The target accepts what it drafted itself.
    assert (plain.num_accepted == K).all()


def test_degenerate_rows_have_the_tokens_and_flags_that_verify_gives_them():
    target, logits = np.zeros((7, 3, 8), "f"), np.zeros((7, 2, 8), "f")
    target[..., 5], logits[..., 5] = 90.0, 90.0  # both models are certain of token 5
    target[0, 0], target[1, 1], target[2, 0] = np.nan, -np.inf, np.inf
    logits[3, 0], logits[4, 0, 5] = np.nan, -np.inf
    tokens = np.full((7, 2), 5)
    tokens[[0, 1, 2], [0, 1, 0]] = 0  # the token that a degenerate row emits
    tokens[5, 0], tokens[6, 0] = 2**31 - 1, 8  # outside the vocabulary
    result = coupled_step(jax.random.key(0), target, ss.Draft(tokens, logits))
    assert result.status.tolist() == [ss.DEGENERATE_TARGET] * 3 + [ss.DEGENERATE_DRAFT] * 4
    assert result.tokens[:3].tolist() == [[0, -1, -1], [5, 0, -1], [0, -1, -1]]
    # q does not decide: a draft that equals the target's sample is kept.
    assert result.num_accepted.tolist() == [0, 1, 0, 2, 2, 0, 0]
    assert (result.tokens[3:, 0] == 5).all()


def test_a_token_of_probability_zero_is_never_emitted():
    logits = jnp.broadcast_to(jnp.array([-jnp.inf, -1e30, -jnp.inf, -2e30]), (1000, 4))
    assert set(coupled_sample(jax.random.key(0), logits)[0].tolist()) == {1}


@pytest.mark.parametrize(("bits", "smallest", "largest"), [(0, 22, 23), (2**32 - 1, -3, -2.8)])
def test_the_extreme_bits_make_finite_noise(monkeypatch, bits, smallest, largest):
    monkeypatch.setattr(gumbel, "threefry_2x32", lambda key, counts: jnp.full_like(counts, bits))
    noise = gumbel.noise(jax.random.split(jax.random.key(0), (1, 1)), 0, 4)
    assert np.all((noise > smallest) & (noise < largest))


# Which noise drew a draft


@pytest.mark.parametrize("rule", [ss.verify, ss.verify_block, ss.verify_sigmoid])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_coupled_drafts_are_refused_by_rules_that_need_independent_ones(rule, transform):
    target, logits = jnp.zeros((2, 2, 3, 4)), jnp.zeros((2, 2, 2, 4))
    draft = ss.Draft(jnp.zeros((2, 2, 2), int), logits, noise=ss.CoupledNoise())
    arguments = jax.random.split(jax.random.key(0), (2, 2)), target, draft
    if transform is not jax.vmap:
        arguments = jax.tree.map(lambda x: x[0], arguments)
    assert arguments[2].noise is not None
    with pytest.raises(ValueError, match=r"drawn by sample_coupled.*verify_coupled"):
        transform(rule)(*arguments)


def test_the_mark_is_checked_and_has_no_leaves():
    draft = ss.Draft(jnp.zeros((1, 1), int))
    marked = draft._replace(noise=ss.CoupledNoise())
    assert len(jax.tree.leaves(marked)) == len(jax.tree.leaves(draft)) == 1
    assert jax.tree.structure(marked) != jax.tree.structure(draft)
    with pytest.raises(ValueError, match=r"draft.noise must be None or CoupledNoise\(\); got bool"):
        ss.verify_coupled(jax.random.key(0), jnp.zeros((1, 2, 4)), draft._replace(noise=True))


verify_coupled = inspect.unwrap(ss.verify_coupled)  # without the types that only tests check


@pytest.mark.parametrize("positions", [-1, 1.5, np.zeros(3, int), None])
@pytest.mark.parametrize(
    "fn",
    [
        lambda key, logits, **options: verify_coupled(key, logits, ss.Draft(jnp.zeros((2, 1), int)), **options),
        lambda key, logits, **options: inspect.unwrap(ss.sample_coupled)(key, logits[:, 0], **options),
    ],
    ids=["verify", "sample"],
)
def test_wrong_positions_are_refused(fn, positions):
    with pytest.raises(ValueError, match="positions must be"):
        fn(jax.random.key(0), jnp.zeros((2, 2, 4)), positions=positions)


def test_there_is_no_kernel():
    draft = ss.Draft(jnp.zeros((1, 0), int))
    with pytest.raises(NotImplementedError, match="a rule that has a kernel"):
        ss.verify_coupled(jax.random.key(0), jnp.zeros((1, 1, 3)), draft, implementation="pallas")
