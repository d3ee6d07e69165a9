"""The mathematics of p and q: normalizers, probabilities, and sampling in two levels."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import BELOW_ONE

import specsamp_jax as ss
from specsamp_jax._types import Filter
from specsamp_jax.sampling import draw
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.filters import make_filter

sample_index = jax.jit(draw.sample_index)
target_rows = jax.jit(dist.target_rows)
log_prob = jax.jit(dist.log_prob)


@jax.jit
def sample_weights(weights, uniforms):
    return draw.sample_weights(weights, draw.tile_sums(weights), uniforms)


def index_of(weights, uniforms):
    weights = np.broadcast_to(np.asarray(weights, np.float32), (len(uniforms), len(weights)))
    return sample_index(jnp.asarray(weights), jnp.asarray(uniforms, jnp.float32)).tolist()


def test_an_index_by_hand():
    # Running sums 0, 1, 1, 3, 4 of 4; the bounds belong to the next index.
    assert index_of([0, 1, 0, 2, 1], [0, 0.2, 0.25, 0.5, 0.74, 0.75, BELOW_ONE]) == [1, 1, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("weights", [[0, 0, 5, 0, 0], [0, 1, 0, 1, 0], [1e-30, 0, 0, 0, 1e30], [0, 0, 2e-38, 0, 1]])
def test_weight_zero_is_never_chosen(weights):
    chosen = index_of(weights, [0, 2.0**-24, 0.1, 0.5, 0.9, BELOW_ONE])
    assert all(weights[i] > 0 for i in chosen)
    assert chosen[0] == np.flatnonzero(weights)[0]


def test_running_sums_that_stay_below_the_uniform_give_the_last_positive_weight(monkeypatch):
    # A parallel running sum may round so that its last entry, the total, is above those that should equal it.
    def rounded(weights, axis):
        return jnp.array([[0.0, 0.5, 0.99, 0.99, 1.0]])

    monkeypatch.setattr(dist.jnp, "cumsum", rounded)
    weights, uniforms = jnp.array([[0.0, 0.5, 0.5, 0.0, 0.0]]), [0.0, 0.4, 0.6, 0.995, BELOW_ONE]
    assert [int(draw.sample_index(weights, jnp.array([u]))[0]) for u in uniforms] == [1, 1, 2, 2, 2]


def test_trailing_zeros_are_never_chosen_however_long_the_sum():
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=(500, 1024)).astype(np.float32) * (np.arange(1024) < rng.integers(1, 1024, (500, 1)))
    chosen = np.asarray(sample_index(weights, jnp.full(500, BELOW_ONE)))
    assert np.all(weights[np.arange(500), chosen] > 0)


def test_no_positive_weight_gives_zero():
    assert index_of([0, 0, 0, 0, 0], [0, 0.5, BELOW_ONE]) == [0, 0, 0]


@pytest.mark.parametrize("vocab_size", [5, 1024, 2500])
def test_two_levels_agree_with_the_oracle(vocab_size):
    rng = np.random.default_rng(vocab_size)
    num_rows = 64
    weights = rng.exponential(size=(num_rows, vocab_size)) * (rng.random((num_rows, vocab_size)) < 0.3)
    weights[:, rng.integers(vocab_size)] = 1
    weights[0, :-1] = 0
    weights[1, 1:] = 0
    weights[:, -1] += 1e-3
    weights = weights.astype(np.float32)
    uniforms = rng.random((num_rows, 2)).astype(np.float32)
    uniforms[::5, 0], uniforms[::7, 1], uniforms[1::5, 0], uniforms[1::7, 1] = 0, 0, BELOW_ONE, BELOW_ONE
    drawn = sample_weights(weights, uniforms)
    compared = 0
    for row, (u_tile, u_element), token in zip(weights, uniforms, drawn.tolist(), strict=True):
        assert row[token] > 0
        if oracle.emission_margin(row, u_tile, u_element, draw.TILE) > 1e-5:
            assert token == oracle.sample_two_level(row, u_tile, u_element, draw.TILE)
            compared += 1
    assert compared > 0.8 * num_rows


def test_a_tile_without_weight_is_never_entered():
    weights = np.zeros((3, 3 * draw.TILE), np.float32)
    weights[:, draw.TILE + 3] = 1e-20
    uniforms = np.array([[0, 0], [0.5, 0.5], [BELOW_ONE, BELOW_ONE]], np.float32)
    assert sample_weights(weights, uniforms).tolist() == [draw.TILE + 3] * 3


def test_tile_sums_of_a_last_short_tile():
    weights = np.ones((2, draw.TILE + 3), np.float32)
    assert jax.jit(draw.tile_sums)(weights).tolist() == [[draw.TILE, 3]] * 2


def test_two_levels_keep_rare_tokens_as_frequent_as_they_are():
    # 2**-20 of the row in a tile of its own: a running sum of the row in float32 would round each of the four
    # equal shares of it by a quarter; within the tile they are exact.
    weights = np.zeros(2 * draw.TILE, np.float32)
    weights[:1000] = (1 - 2.0**-20) / 1000
    weights[-4:] = 2.0**-22
    uniforms = np.stack(np.meshgrid([BELOW_ONE], (np.arange(400) + 0.5) / 400), -1).reshape(-1, 2)
    drawn = sample_weights(np.tile(weights, (400, 1)), uniforms.astype(np.float32))
    assert np.bincount(drawn, minlength=len(weights))[-4:].tolist() == [100] * 4


def test_the_first_largest_skips_nan_and_is_in_the_vocabulary():
    nan, inf = np.nan, np.inf
    rows = [[1, 5, 5, 2], [nan, 1, 2, nan], [1, inf, inf, nan], [-inf, -inf, -inf, -3], [-inf] * 4, [nan] * 4]
    assert dist.first_largest(jnp.array(rows)).tolist() == [1, 2, 1, 3, 0, 0]


def operations(jaxpr):
    """All operations of a program, those of its inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from operations(inner)


def test_a_greedy_row_is_found_without_argmax():
    """XLA's CPU backend does not vectorise `argmax`: greedy rows would take nine times as long as sampled ones."""
    logits, greedy = jnp.zeros((2, 5000)), ss.SamplingParams(temperature=jnp.zeros(2))
    for fn in (
        dist.first_largest,
        lambda z: ss.sample(jax.random.key(0), z, greedy),
        lambda z: ss.verify(jax.random.key(0), z[:, None], ss.Draft(jnp.zeros((2, 0), int)), greedy),
    ):
        found = [eqn for eqn in operations(jax.make_jaxpr(fn)(logits).jaxpr) if eqn.primitive.name == "argmax"]
        # Rows of a tile and of tile sums are short.
        assert all(eqn.invars[0].aval.shape[-1] <= draw.TILE for eqn in found)


def test_log_probs_normalizers_and_probs_of_one_row_agree():
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(3, 1, 50)) * 4, jnp.float32).at[0, 0, 3].set(-jnp.inf)

    @jax.jit
    def evaluate(logits):
        rows = dist.target_rows(logits, Filter())
        log_probs = jax.vmap(lambda token: dist.log_prob(rows, jnp.full((3, 1), token))[:, 0], out_axes=1)(
            jnp.arange(50)
        )
        return log_probs, rows.log_normalizers[:, 0], dist.probs(rows, 50)

    log_probs, log_normalizers, probs = evaluate(logits)
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits[:, 0]), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(log_normalizers, jax.nn.logsumexp(logits[:, 0], axis=-1), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(log_probs), probs, rtol=1e-5)
    assert log_probs[0, 3] == -np.inf
    assert probs[0, 3] == 0


def test_normalizers_that_float32_holds_coarsely_are_computed_again():
    rng = np.random.default_rng(7)
    # At 1e5 neighbours in float32 are 2**-7 apart: each q would be off by up to half a percent.
    logits = (rng.normal(size=(16, 1, 8)) + 1e5).astype(np.float32)
    tokens = rng.integers(8, size=(16, 1)).astype(np.int32)
    exact = logits.astype(np.float64) - 1e5
    exact = np.take_along_axis(exact - np.logaddexp.reduce(exact, axis=-1)[..., None], tokens[..., None], -1)[..., 0]
    coarse = (np.logaddexp.reduce(logits.astype(np.float64) - 1e5, axis=-1) + 1e5).astype(np.float32)
    rows = dist.draft_rows(ss.Draft(jnp.asarray(tokens), jnp.asarray(logits), None, jnp.asarray(coarse)), Filter())
    np.testing.assert_allclose(log_prob(rows, jnp.asarray(tokens)), exact, atol=1e-5)
    # Small ones are taken as they are.
    draft = ss.Draft(jnp.asarray(tokens), jnp.asarray(logits - np.float32(1e5)), None, jnp.full((16, 1), 5.0))
    assert dist.draft_rows(draft, Filter()).log_normalizers.tolist() == [[5.0]] * 16


def test_log_prob_of_an_invalid_token_or_a_degenerate_row():
    logits = jnp.array([[[0.0, 1.0]], [[jnp.nan, 1.0]], [[jnp.inf, 1.0]], [[-jnp.inf, -jnp.inf]]])
    rows = target_rows(logits, Filter())
    assert rows.degenerate[:, 0].tolist() == [False, True, True, True]
    for token in (-1, 2, 1000):
        assert log_prob(rows, jnp.full((4, 1), token))[:, 0].tolist() == [-np.inf] * 4
    assert log_prob(rows, jnp.ones((4, 1), int))[1:, 0].tolist() == [-np.inf] * 3


def test_no_log_prob_is_above_zero():
    # One token has all but nothing of the mass, and its logit is large: logit - logsumexp may round above 0.
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(200, 1, 8)), jnp.float32).at[:, 0, 0].add(100)
    rows = target_rows(logits, Filter())
    normalizers = rows.log_normalizers
    draft = ss.Draft(jnp.zeros((200, 1), int), logits, None, normalizers - 1e-5)
    for each in (rows, dist.draft_rows(draft, Filter())):
        assert log_prob(each, jnp.zeros((200, 1), int)).max() <= 0


def test_a_greedy_target_row_has_all_its_probability_on_its_first_largest_logit():
    logits = jnp.array([[[1.0, 2.0, 2.0]], [[1.0, 2.0, 2.0]]])
    rows = target_rows(logits, make_filter(logits, ss.SamplingParams(temperature=jnp.array([0.0, 1.0]))))
    assert dist.probs(rows, 3)[0].tolist() == [0, 1, 0]
    assert log_prob(rows, jnp.array([[1], [1]]))[0, 0] == 0
    assert log_prob(rows, jnp.array([[2], [2]]))[0, 0] == -np.inf
    np.testing.assert_allclose(dist.probs(rows, 3)[1], jax.nn.softmax(logits[1, 0]), rtol=1e-6)


def test_a_draft_without_logits_has_all_its_probability_on_its_tokens():
    rows = dist.draft_rows(ss.Draft(jnp.array([[2, -1]])), Filter())
    assert log_prob(rows, jnp.array([[2, 0]]))[0, 0] == 0
    assert log_prob(rows, jnp.array([[1, 0]]))[0, 0] == -np.inf
    assert dist.probs(rows.take(jnp.array([0])), 4).tolist() == [[0, 0, 1, 0]]
