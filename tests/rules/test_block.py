"""The block rule: its oracle is exact, the core follows the oracle, and it never accepts less than the token rule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables
from inputs import BELOW_ONE, with_uniforms

import specsamp_jax as ss
from specsamp_jax._types import Uniforms
from specsamp_jax.rules.block import verify_block
from specsamp_jax.sampling import streams

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


@pytest.mark.parametrize("vocab", [3, 4])
@pytest.mark.parametrize("num_draft", [0, 1, 2, 3])
def test_rounds_have_the_law_of_the_search_by_sums(vocab, num_draft):
    for seed in range(3):
        rng = np.random.default_rng(seed)
        p, q = random_law(rng, vocab, num_draft + 1), random_law(rng, vocab, num_draft + 1, 1.0)
        expected = oracle.block_law(p, q, num_draft)
        for num_rounds in (0, 1, 2, 5):
            law = oracle.rounds_law(p, q, num_draft, num_rounds)
            assert sum(law.values()) == pytest.approx(1, abs=1e-12)
            for tokens in expected.keys() | law.keys():
                assert law.get(tokens, 0) == pytest.approx(expected.get(tokens, 0), abs=1e-12)


def test_the_example_of_the_paper():
    p, q = (lambda prefix: np.array([1, 2]) / 3), (lambda prefix: np.array([2, 1]) / 3)
    assert mean_length(oracle.block_law(p, q, 2)) - 1 == pytest.approx(11 / 9)
    assert mean_length(oracle.speculative_law(p, q, 2)) - 1 == pytest.approx(10 / 9)


# The core


jit_rule = with_uniforms(verify_block, TILE)


def random_uniforms(rng, batch_size, num_draft, num_rounds):
    accept, emit = (rng.random((batch_size, n)).astype("f") for n in (num_draft, 2))
    rounds = None if num_rounds is None else rng.random((batch_size, 3, num_rounds)).astype("f")
    return Uniforms(accept, emit, rounds)


# Without rounds, with few, after which many are undecided, and with 16.
@pytest.mark.parametrize(
    ("kind", "num_draft", "num_rounds"),
    [
        *((kind, 3, n) for kind in ("soft", "ragged", "filtered", "one-hot", "greedy") for n in (None, 2, 16)),
        *(("soft", 1, n) for n in (None, 2, 16)),
    ],
)
def test_random_rows_agree_with_the_oracle(kind, num_draft, num_rounds):
    rng = np.random.default_rng(num_draft)
    target = (rng.normal(size=(B, num_draft + 1, V)) * 2).astype("f")
    logits = (0.7 * target[:, :-1] + rng.normal(size=(B, num_draft, V))).astype("f")
    filters = {"temperature": 0.8, "top_k": 9, "top_p": 0.95, "min_p": 0.01}
    of_target = {"filtered": filters, "greedy": {"temperature": 0.0}}.get(kind, {})
    of_draft = filters if kind == "filtered" else {}
    p, q = (
        np.array([[oracle.distribution(row.astype(float), **setting) for row in rows] for rows in array])
        for array, setting in ((target, of_target), (logits, of_draft))
    )
    tokens = np.array([[rng.choice(V, p=row) for row in rows] for rows in q])
    if kind == "ragged":
        tokens[rng.random(tokens.shape) < 0.3] = -1
    if kind == "one-hot":
        q = np.eye(V)[tokens]
    draft = ss.Draft(tokens, None if kind == "one-hot" else logits, ss.SamplingParams(**of_draft))
    uniforms = random_uniforms(rng, B, num_draft, num_rounds)
    result = jit_rule(target, ss.SamplingParams(**of_target), draft, uniforms)
    accept, emit, rounds = (np.zeros((B, 3, 0)) if u is None else u.astype(float) for u in uniforms)
    num_compared, num_played = 0, []
    for row in range(B):
        arguments = p[row], q[row], tokens[row], accept[row], emit[row], rounds[row], TILE
        want, margin, played = oracle.verify_block(*arguments, plays=kind != "greedy")
        if margin < 1e-5:  # rounding to float32 may change a decision
            continue
        num_compared += 1
        num_played.append(played)
        n = int(result.num_accepted[row])
        assert result.tokens[row, : n + 1].tolist() == want
        np.testing.assert_array_equal(result.tokens[row, n + 1 :], -1)
        np.testing.assert_allclose(
            result.log_probs[row, : n + 1], np.log([p[row, i, token] for i, token in enumerate(want)]), rtol=1e-4
        )
    assert num_compared > 0.95 * B
    if num_rounds and kind != "greedy":
        # Sequences that keep all, that a round decides, and that none decides.
        assert min(played for played in num_played) == 0
        assert any(0 < played <= num_rounds for played in num_played)
        assert num_rounds > 2 or max(num_played) > num_rounds


@pytest.mark.parametrize("num_rounds", [None, 2, 16])
def test_boundary_uniforms_emit_nothing_of_probability_or_weight_zero(num_rounds):
    p = np.array([[0.5, 0.5, 0, 0]] * 3)
    # All uniforms at both ends, and each kind of the rounds' uniforms by itself.
    ends = np.array(list(itertools.product([0, BELOW_ONE], repeat=5)), "f")
    accept, emit = (np.repeat(ends[:, i : i + 1], 2, axis=1) for i in (0, 1))
    rounds = None if num_rounds is None else np.repeat(ends[:, 2:, None], num_rounds, axis=2)
    for q in ([0.25, 0.25, 0.25, 0.25], [0.6, 0.1, 0.2, 0.1], [0, 0.5, 0.5, 0]):
        for tokens in ([0, 1], [1, 1], [2, 0], [0, 2], [3, 3]):
            q_rows = np.array([q] * 2)
            with np.errstate(divide="ignore"):
                target, logits = (np.tile(np.log(rows).astype("f"), (32, 1, 1)) for rows in (p, q_rows))
            draft = ss.Draft(jnp.tile(jnp.array(tokens), (32, 1)), logits)
            result = jit_rule(target, None, draft, Uniforms(accept, emit, rounds))
            num_usable = int(np.cumprod([q[token] > 0 for token in tokens]).sum())
            joint, _ = oracle.block_probs(p[: num_usable + 1], q_rows[:num_usable], np.array(tokens[:num_usable]))
            for emitted, n in zip(result.tokens, result.num_accepted, strict=True):
                assert set(emitted[: n + 1].tolist()) <= {0, 1}
                assert n == num_usable or joint[n] * p[n, emitted[n]] > q[emitted[n]]


@pytest.mark.parametrize("num_rounds", [None, 2, 16])
def test_equal_models_accept_all(num_rounds):
    logits = np.random.default_rng(0).normal(size=(4, 4, V)).astype("f")
    draft = ss.Draft(jnp.zeros((4, 3), jnp.int32), logits[:, :-1])
    rounds = None if num_rounds is None else jnp.zeros((4, 3, num_rounds), "f")
    uniforms = Uniforms(jnp.full((4, 3), BELOW_ONE, "f"), jnp.full((4, 2), 0.5, "f"), rounds)
    assert jit_rule(logits, None, draft, uniforms).num_accepted.tolist() == [3] * 4


@pytest.mark.parametrize("num_rounds", [None, 16])
def test_degenerate_rows_end_a_draft(num_rounds):
    target = np.zeros((3, 3, V), "f")
    draft_logits = np.zeros((3, 2, V), "f")
    target[0, 1], draft_logits[1, 1], draft_logits[2, 0, 5] = np.nan, np.nan, -np.inf
    tokens = jnp.array([[1, 2], [1, 2], [5, 2]])
    rounds = None if num_rounds is None else jnp.full((3, 3, num_rounds), 0.3, "f")
    uniforms = Uniforms(jnp.full((3, 2), 0.5, "f"), jnp.full((3, 2), 0.3, "f"), rounds)
    result = jit_rule(target, None, ss.Draft(tokens, draft_logits), uniforms)
    assert result.num_accepted.tolist() == [1, 1, 0]
    assert result.status.tolist() == [ss.DEGENERATE_TARGET, ss.DEGENERATE_DRAFT, ss.DEGENERATE_DRAFT]
    assert result.tokens[0, 1] == 0
    assert np.all(np.asarray(result.tokens) < V)


# The law of the public function

NUM_DRAWS, K, SMALL = 40_000, 2, 4


@pytest.mark.optimised(True)  # runs for longer than it compiles
@pytest.mark.parametrize("num_rounds", [0, 2, streams.ROUNDS])
def test_drawn_steps_follow_the_law(assert_law, monkeypatch, num_rounds):
    monkeypatch.setattr(streams, "ROUNDS", num_rounds)
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


@pytest.mark.optimised(True)  # compares bits
@pytest.mark.parametrize("vocab_size", [40, 9000])
def test_a_row_depends_on_its_uniforms_alone(vocab_size):
    """Some rows are decided in rounds and some after them, at other places of the batch and alone."""
    batch_size, num_draft, num_rounds = 48, 3, 5
    rng = np.random.default_rng(4)
    target = rng.normal(size=(batch_size, num_draft + 1, vocab_size)).astype("f")
    logits = (target[:, :-1] + rng.normal(size=(batch_size, num_draft, vocab_size)) / 2).astype("f")
    # Tokens that p likes less than q does, so that coins decide about rows.
    tokens = (logits - target[:, :-1] + target[:, :-1] / 4).argmax(-1)
    uniforms = random_uniforms(rng, batch_size, num_draft, num_rounds)
    step = with_uniforms(verify_block, 16 if vocab_size == 40 else 1024)
    whole = jax.tree.map(np.asarray, step(target, None, ss.Draft(tokens, logits), uniforms))
    without = step(target, None, ss.Draft(tokens, logits), uniforms._replace(rounds=uniforms.rounds[:, :, :0]))
    played = np.any(whole.tokens != without.tokens, axis=1)
    assert 0 < played.sum() < batch_size
    for rows in ([0], [3], [7], list(range(batch_size))[::-1]):
        inputs = jax.tree.map(lambda array, rows=rows: array[np.array(rows)], (target, logits, tokens, uniforms))
        result = step(inputs[0], None, ss.Draft(inputs[2], inputs[1]), inputs[3])
        for a, b in zip(result, whole, strict=True):
            assert np.asarray(a).tobytes() == b[np.array(rows)].tobytes()


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
