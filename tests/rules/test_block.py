"""The block rule: its oracle is exact, the core follows the oracle, and it never accepts less than the token rule."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables
from inputs import with_uniforms

import specsamp_jax as ss
from specsamp_jax._types import Uniforms
from specsamp_jax.rules.block import verify_block

pytestmark = pytest.mark.optimised(False)

B, V, TILE = 256, 13, 4


def random_law(rng, vocab, num_tokens, sharpness=2.0, zeros=0.2):
    """A function from a prefix to a distribution, some of whose tokens have probability zero."""
    size = (vocab + 1,) * num_tokens
    weights = np.exp(rng.normal(size=(*size, vocab)) * sharpness) * (rng.random((*size, vocab)) > zeros)
    weights[..., 0] += 1e-3
    table = weights / weights.sum(-1, keepdims=True)
    return lambda prefix: table[(*prefix, *([vocab] * (num_tokens - len(prefix))))[:num_tokens]]


def mean_length(law):
    return sum(len(tokens) * mass for tokens, mass in law.items())


# The oracle


@pytest.mark.parametrize("vocab", [3, 4])
@pytest.mark.parametrize("num_draft", [0, 1, 2, 3])
def test_the_oracle_is_exact_and_emits_at_least_as_many_tokens_as_the_token_rule(vocab, num_draft):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        p, q = random_law(rng, vocab, num_draft + 1), random_law(rng, vocab, num_draft + 1, 1.0)
        block = oracle.block_law(p, q, num_draft)
        completed, expected = oracle.completed_law(block, p, num_draft + 1), oracle.target_law(p, num_draft + 1)
        for tokens in expected.keys() | completed.keys():
            assert completed.get(tokens, 0) == pytest.approx(expected.get(tokens, 0), abs=1e-12)
        assert mean_length(block) >= mean_length(oracle.speculative_law(p, q, num_draft)) - 1e-12


def test_the_example_of_the_paper():
    p, q = (lambda prefix: np.array([1, 2]) / 3), (lambda prefix: np.array([2, 1]) / 3)
    assert mean_length(oracle.block_law(p, q, 2)) - 1 == pytest.approx(11 / 9)
    assert mean_length(oracle.speculative_law(p, q, 2)) - 1 == pytest.approx(10 / 9)


# The core


jit_rule = with_uniforms(verify_block, TILE)


def expected_tokens(p, q, tokens, accept, emit):
    """The oracle's emitted tokens of one sequence; None if rounding to float32 may change a decision."""
    num_drafted = int(np.cumprod(tokens >= 0).sum())
    tokens, q = tokens[:num_drafted], q[:num_drafted]
    joint, keep = oracle.block_probs(p, q, tokens)
    if np.any(np.abs(accept[:num_drafted] - keep[1:]) < 1e-5):
        return None
    n = max(i for i in range(num_drafted + 1) if i == 0 or accept[i - 1] < keep[i])
    weights = p[n] if n == num_drafted else np.maximum(joint[n] * p[n] - q[n], 0)
    if weights.sum() < 1e-6 or oracle.emission_margin(weights, *emit, TILE) < 1e-5 / weights.sum():
        return None
    return [*tokens[:n], oracle.sample_two_level(weights, *emit, TILE)]


@pytest.mark.parametrize("num_draft", [1, 3])
@pytest.mark.parametrize("kind", ["soft", "ragged", "filtered", "one-hot"])
def test_random_rows_agree_with_the_oracle(kind, num_draft):
    rng = np.random.default_rng(num_draft)
    target = (rng.normal(size=(B, num_draft + 1, V)) * 2).astype("f")
    logits = (0.7 * target[:, :-1] + rng.normal(size=(B, num_draft, V))).astype("f")
    setting = {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01} if kind == "filtered" else {}
    sampling = ss.SamplingParams(**setting)
    p, q = (
        np.array([[oracle.distribution(row.astype(float), **setting) for row in rows] for rows in array])
        for array in (target, logits)
    )
    tokens = np.array([[rng.choice(V, p=row) for row in rows] for rows in q])
    if kind == "ragged":
        tokens[rng.random(tokens.shape) < 0.3] = -1
    if kind == "one-hot":
        q = np.eye(V)[tokens]
    draft = ss.Draft(tokens, None if kind == "one-hot" else logits, sampling)
    accept, emit = (rng.random((B, n)).astype("f") for n in (num_draft, 2))
    result = jit_rule(target, sampling, draft, Uniforms(accept, emit))
    num_compared = 0
    for row in range(B):
        want = expected_tokens(p[row], q[row], tokens[row], accept[row].astype(float), emit[row].astype(float))
        if want is not None:
            num_compared += 1
            n = int(result.num_accepted[row])
            assert result.tokens[row, : n + 1].tolist() == want
            np.testing.assert_array_equal(result.tokens[row, n + 1 :], -1)
            np.testing.assert_allclose(
                result.log_probs[row, : n + 1], np.log([p[row, i, token] for i, token in enumerate(want)]), rtol=1e-4
            )
    assert num_compared > 0.95 * B


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-24])
def test_boundary_uniforms_emit_nothing_of_probability_zero(u):
    p = np.array([[[0.5, 0.5, 0, 0]] * 3], "f")
    q = np.array([[[0.25] * 4] * 2], "f")
    for tokens in ([0, 1], [2, 0], [0, 2], [3, 3]):
        draft = ss.Draft(jnp.array([tokens]), jnp.log(q))
        uniforms = Uniforms(jnp.full((1, 2), u, "f"), jnp.full((1, 2), u, "f"))
        n = int((result := jit_rule(jnp.log(p), None, draft, uniforms)).num_accepted[0])
        assert set(result.tokens[0, : n + 1].tolist()) <= {0, 1}


def test_equal_models_accept_all():
    logits = np.random.default_rng(0).normal(size=(4, 4, V)).astype("f")
    draft = ss.Draft(jnp.zeros((4, 3), jnp.int32), logits[:, :-1])
    uniforms = Uniforms(jnp.full((4, 3), 1 - 2.0**-24, "f"), jnp.full((4, 2), 0.5, "f"))
    assert jit_rule(logits, None, draft, uniforms).num_accepted.tolist() == [3] * 4


def test_degenerate_rows_end_a_draft():
    target = np.zeros((3, 3, V), "f")
    draft_logits = np.zeros((3, 2, V), "f")
    target[0, 1], draft_logits[1, 1], draft_logits[2, 0, 5] = np.nan, np.nan, -np.inf
    tokens = jnp.array([[1, 2], [1, 2], [5, 2]])
    uniforms = Uniforms(jnp.full((3, 2), 0.5, "f"), jnp.full((3, 2), 0.3, "f"))
    result = jit_rule(target, None, ss.Draft(tokens, draft_logits), uniforms)
    assert result.num_accepted.tolist() == [1, 1, 0]
    assert result.status.tolist() == [ss.DEGENERATE_TARGET, ss.DEGENERATE_DRAFT, ss.DEGENERATE_DRAFT]
    assert result.tokens[0, 1] == 0
    assert np.all(np.asarray(result.tokens) < V)


# The law of the public function

NUM_DRAWS, K, SMALL = 40_000, 2, 4


@pytest.mark.optimised(True)  # runs for longer than it compiles
def test_drawn_steps_follow_the_law(assert_law):
    rng = np.random.default_rng(7)
    p, q = random_law(rng, SMALL, K + 1), random_law(rng, SMALL, K + 1, 1.0, zeros=0.0)
    p_table = jnp.log(jnp.array([[p((a, b)) for b in range(SMALL)] for a in range(SMALL)], jnp.float32))
    q_table = jnp.log(jnp.array([q((a,)) for a in range(SMALL)], jnp.float32))
    p_first = jnp.log(jnp.array([p((a,)) for a in range(SMALL)], jnp.float32))
    start = jnp.log(jnp.array([p(()), q(())], jnp.float32))

    @jax.jit
    def step(key):
        rows = jnp.zeros((NUM_DRAWS, 1))
        first, _ = ss.sample(jax.random.fold_in(key, 1), start[1] + rows)
        second, _ = ss.sample(jax.random.fold_in(key, 2), q_table[first])
        draft = ss.Draft(jnp.stack([first, second], 1), jnp.stack([start[1] + rows, q_table[first]], 1))
        target = jnp.stack([start[0] + rows, p_first[first], p_table[first, second]], 1)
        return ss.verify_block(key, target, draft).tokens

    tokens = step(jax.random.key(0))
    assert_law(tokens, oracle.block_law(p, q, K))
    with pytest.raises(AssertionError):
        assert_law(tokens, oracle.speculative_law(p, q, K))


@pytest.mark.optimised(True)  # compares bits
def test_a_row_depends_on_its_key_alone():
    rng = np.random.default_rng(3)
    target, logits = (jnp.asarray(rng.normal(size=(5, n, 40)), jnp.float32) for n in (4, 3))
    tokens = jnp.asarray(rng.integers(0, 40, (5, 3)))
    keys = jax.random.split(jax.random.key(1), 5)
    step = jax.jit(ss.verify_block)
    whole = step(keys, target, ss.Draft(tokens, logits))
    for row in range(5):
        part = slice(row, row + 1)
        alone = step(keys[part], target[part], ss.Draft(tokens[part], logits[part]))
        for a, b in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(a[0], b[row])


@pytest.mark.both_programs(False)
def test_the_loop_takes_the_block_rule():
    target, draft = tables.model(tables.table(0)), tables.model(tables.table(1))
    options = {"target": target, "draft": draft, "max_new_tokens": 12, "num_draft": 3}
    prompt = np.ones((64, 2), int)
    block = ss.generate(jax.random.key(0), prompt, verify_fn=ss.verify_block, **options)
    assert block.lengths.tolist() == [14] * 64
    greedy = ss.generate(
        jax.random.key(0), prompt, sampling=ss.SamplingParams(0.0), verify_fn=ss.verify_block, **options
    )
    text = [1, 1]
    for _ in range(12):
        text.append(int(tables.logits_after(tables.table(0), text).argmax()))
    assert greedy.tokens.tolist() == [text] * 64
