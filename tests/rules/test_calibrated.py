"""The calibrated rule: its law and the bound by enumeration, agreement with the oracle, and its state in the loop."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables
from inputs import BELOW_ONE, quick_jit
from jax import export
from scipy.special import logsumexp

import specsamp_jax as ss
from specsamp_jax._types import Filter, Uniforms
from specsamp_jax.rules import calibrated, calibration

pytestmark = pytest.mark.optimised(False)


def distance(law, other):
    return sum(abs(law.get(key, 0) - other.get(key, 0)) for key in law.keys() | other.keys()) / 2


# The bound


@pytest.mark.parametrize("vocab_size", [3, 4])
def test_the_law_of_a_token_is_within_the_bound_of_the_targets(vocab_size):
    rng, nearest, bounds = np.random.default_rng(vocab_size), np.inf, {0.0: [], 1.0: [], 4.0: [], 10.0: []}
    for _ in range(500):
        z = rng.normal(size=vocab_size) * rng.choice([0.3, 2, 5])
        q = oracle.distribution(rng.normal(size=vocab_size) * rng.choice([0.3, 2, 5]))
        error, offset = rng.normal() * rng.choice([0.01, 0.5, 3]), float(rng.choice([0, 1, 4, 10]))
        estimate = logsumexp(z) + error
        law = oracle.calibrated_law(
            lambda _, z=z: z, lambda _, q=q: q, 1, estimate=lambda _, e=estimate: e, offset=offset
        )
        first = oracle.completed_law(law, lambda _, z=z: oracle.distribution(z), 2)
        p = oracle.distribution(z)
        marginal = np.array([sum(mass for key, mass in first.items() if key[0] == v) for v in range(vocab_size)])
        bound = oracle.calibrated_bound(error, offset)
        assert np.abs(marginal - p).sum() / 2 <= bound + 1e-12
        bounds[offset].append((error, bound))
        nearest = min(nearest, bound - np.abs(marginal - p).sum() / 2 if bound > 0.01 else np.inf)
        if error >= np.log1p(np.exp(-offset)):
            np.testing.assert_allclose(marginal, p, atol=1e-12)
    assert nearest < 0.02
    for offset, pairs in bounds.items():
        errors, expected = np.array(pairs).T
        np.testing.assert_allclose(calibrated.bound(jnp.float32(errors), offset), expected, rtol=1e-5, atol=1e-6)


def test_the_bound_is_reached():
    # All of q on a token of probability exp(error): the estimate makes it certain, and it is always accepted.
    for error in (-0.1, -1.0, -5.0):
        z = np.log([np.exp(error), 1 - np.exp(error)])
        a = oracle.calibrated_accept(z, oracle.one_hot(0, 2), error, 50)
        assert a[0] == 1
        assert oracle.calibrated_bound(error, 50) == pytest.approx(1 - np.exp(error))


def test_the_law_of_a_step_is_within_the_expected_sum_of_the_bounds():
    rng, num_draft, vocab_size = np.random.default_rng(0), 2, 3
    for _ in range(30):
        z = {(): rng.normal(size=3), **{(i,): rng.normal(size=3) * 2 for i in range(3)}}
        z |= {(i, j): rng.normal(size=3) for i in range(3) for j in range(3)}
        q = {prefix: oracle.distribution(rng.normal(size=3) * 2) for prefix in z}
        error = {prefix: rng.normal() for prefix in z}
        estimates = {prefix: logsumexp(z[prefix]) + error[prefix] for prefix in z}
        law = oracle.calibrated_law(z.get, q.get, num_draft, estimate=estimates.get, offset=4)

        def p(prefix, z=z):
            return oracle.distribution(z[prefix])

        difference = distance(oracle.completed_law(law, p, num_draft + 1), oracle.target_law(p, num_draft + 1))
        expected = oracle.calibrated_bound(error[()], 4)
        for i in range(vocab_size):
            reached = q[()][i] * oracle.calibrated_accept(z[()], q[()], estimates[()], 4)[i]
            expected += reached * oracle.calibrated_bound(error[(i,)], 4)
        assert difference <= expected + 1e-12


# The library


N = 512


@pytest.mark.parametrize(("vocab_size", "error", "offset"), [(3, -0.4, 1), (4, 0.7, 4), (4, None, 0)])
def test_the_library_has_the_law_of_the_oracle(vocab_size, error, offset):
    """Each token is drafted and rejected N times, with emission uniforms on a grid: the whole law to 1/N."""
    rng = np.random.default_rng(vocab_size)
    z, z_q, z_next = (rng.normal(size=vocab_size).astype("f") * 1.5 for _ in range(3))
    z[0] = -np.inf
    p, q = oracle.distribution(z), oracle.distribution(z_q)
    estimate = logsumexp(z.astype(float)) + (error or 0)
    tokens = np.repeat(np.arange(vocab_size, dtype=np.int32), N)[:, None]
    batch_size = len(tokens)
    grid = np.stack([np.full(N, 0.5), (np.arange(N) + 0.5) / N], 1).astype("f")
    uniforms = Uniforms(np.full((batch_size, 1), BELOW_ONE, "f"), np.tile(grid, (vocab_size, 1)))
    arguments = (
        np.tile(np.stack([z, z_next]), (batch_size, 1, 1)),
        ss.Draft(tokens, np.tile(z_q, (batch_size, 1, 1))),
        uniforms,
        None if error is None else np.full((batch_size, 1), estimate, "f"),
    )

    @quick_jit
    def rule(target_logits, draft, uniforms, estimates):
        options = {"offset": offset, "log_normalizers": estimates}
        return calibrated.verify_calibrated(target_logits, Filter(), draft, Filter(), uniforms, **options)

    result, report = jax.tree.map(np.asarray, rule(*arguments))
    accept = oracle.calibrated_accept(z, q, estimate, offset)
    np.testing.assert_allclose(result.accept_prob[::N, 0], accept, rtol=2e-6)
    residual = oracle.calibrated_residual(z, q, estimate, offset)
    bonus = oracle.distribution(z_next)
    for v in range(vocab_size):
        rows = slice(v * N, (v + 1) * N)
        rejected = result.num_accepted[rows] == 0
        assert rejected.all() or accept[v] == 1
        emitted = np.where(rejected, result.tokens[rows, 0], result.tokens[rows, 1])
        counted = np.bincount(emitted, minlength=vocab_size) / N
        np.testing.assert_allclose(counted, residual if rejected.all() else bonus, atol=2 / N)
    np.testing.assert_allclose(report.log_normalizers[0], [logsumexp(z.astype(float)), logsumexp(z_next)], rtol=1e-5)
    np.testing.assert_allclose(report.error, error or 0, atol=1e-6)
    np.testing.assert_allclose(report.bound, oracle.calibrated_bound(error or 0, offset), rtol=1e-5, atol=1e-7)
    # The log-probabilities are the target's own.
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(result.log_probs[:, 0], np.log(p)[result.tokens[:, 0]], rtol=1e-5, atol=1e-6)


def test_filters_greedy_rows_and_edges():
    z = jnp.log(jnp.array([[[0.6, 0.3, 0.1], [0.2, 0.2, 0.6]]])).repeat(4, 0)
    draft = ss.Draft(jnp.array([[0], [2], [1], [1]]), z[:, 1:])
    sampling = ss.SamplingParams(np.array([0.0, 0.0, 1.0, 1.0], "f"), top_k=np.array([0, 0, 1, 0]))
    # Greedy: estimates do not matter. Only the first token is kept. An estimate of +inf rejects.
    estimates = np.array([[-50.0], [-50.0], [0.0], [np.inf]], "f")

    @quick_jit
    def rule(key, target_logits, draft, sampling, estimates):
        return ss.verify_calibrated(key, target_logits, draft, sampling, log_normalizers=estimates)

    result = rule(jax.random.key(0), z, draft, sampling, estimates)
    assert result.num_accepted.tolist() == [1, 0, 0, 0]
    assert result.tokens[:3].tolist() == [[0, 2], [0, -1], [0, -1]]
    assert result.accept_prob[:, 0].tolist() == [1, 0, 0, 0]
    assert result.status.tolist() == [0] * 4


def test_wrong_arguments_are_refused(monkeypatch):
    # jaxtyping is off, so that the library's own errors are raised.
    monkeypatch.setattr(calibration, "calibrated_with_report", inspect.unwrap(calibration.calibrated_with_report))
    verify = inspect.unwrap(ss.verify_calibrated)
    arguments = jax.random.key(0), jnp.zeros((4, 2, 3)), ss.Draft(jnp.zeros((4, 1), int))
    with pytest.raises(ValueError, match=r"log_normalizers must have shape \[B, K\] = \[4, 1\]"):
        verify(*arguments, log_normalizers=jnp.zeros((4, 2)))
    with pytest.raises(ValueError, match="offset must be a Python number, at least 0"):
        verify(*arguments, offset=-1)
    with pytest.raises(ValueError, match=r"CalibratedRule.rate must be in \[0, 1\]"):
        ss.CalibratedRule(rate=2.0)


# The rule in the loop

TARGET, DRAFT = tables.table(3, 1.0), tables.table(4, 1.0)
MODELS = {"target": tables.model(TARGET), "draft": tables.model(DRAFT), "num_draft": 2}
PROMPT = np.array([[1, 2, 1], [2, 0, 3]])


RULE = ss.CalibratedRule(offset=6.0, margin=0.2, rate=0.4)


@pytest.fixture(scope="module")
def loop():
    """The state before the first step, and the step."""
    state = ss.init(PROMPT, max_new_tokens=9, verify_fn=RULE, **MODELS)
    state = state._replace(limits=state.limits - jnp.array([6, 0]))  # the first row is finished first

    def step(key, state):
        return ss.step(key, state, verify_fn=RULE, **MODELS)

    exported = export.export(jax.jit(step))(jax.random.key(0), state)
    return state, jax.jit(export.deserialize(exported.serialize()).call), step


@pytest.mark.both_programs(False)
def test_the_state_follows_the_rows_that_emitted_the_last_token(loop):
    state, step, _ = loop
    read, decided, bounds, errors = [[], []], [0, 0], [[], []], [[], []]
    estimates = [np.inf, np.inf]
    while not state.finished.all():
        before, (state, info) = state, step(jax.random.key(5), state)
        for row in range(2):
            if before.finished[row]:
                assert jax.tree.map(lambda x, row=row: x[row], state.verify_state) == jax.tree.map(
                    lambda x, row=row: x[row], before.verify_state
                )
                continue
            n, drafted = int(info.num_accepted[row]), int(info.num_drafted[row])
            text = np.asarray(state.tokens[row]).tolist()
            begin = int(before.lengths[row])
            exact = [logsumexp(tables.logits_after(TARGET, text[: begin + i]).astype(float)) for i in range(n + 1)]
            if read[row]:
                error = estimates[row] + 0.2 - np.array(exact[: min(n + 1, drafted)])
                decided[row] += len(error)
                errors[row] += list(np.abs(error))
                bounds[row] += [oracle.calibrated_bound(e, 6.0) for e in error]
            else:
                assert n == 0  # there is no estimate yet
            read[row].append(exact[-1])
            weight = max(1 / len(read[row]), 0.4)
            estimates[row] = (
                exact[-1] if len(read[row]) == 1 else estimates[row] + weight * (exact[-1] - estimates[row])
            )
    result = state.verify_state
    assert result.num_decided.tolist() == decided
    assert result.num_read.tolist() == [len(rows) for rows in read]
    np.testing.assert_allclose(result.log_normalizer, estimates, rtol=1e-5)
    np.testing.assert_allclose(result.sum_bound, [sum(b) for b in bounds], rtol=1e-4)
    np.testing.assert_allclose(result.max_bound, [max(b) for b in bounds], rtol=1e-4)
    np.testing.assert_allclose(result.sum_error, [sum(e) for e in errors], rtol=1e-4)


@pytest.mark.both_programs(False)
def test_a_row_is_refilled_by_indexing_after_an_exported_step(loop):
    state, step, unexported = loop
    used = step(jax.random.key(0), state)[0]
    assert isinstance(used.verify_state, ss.Calibration)
    refilled = jax.tree.map(lambda rows, new: rows.at[1].set(new[1]), used, state)
    assert refilled.verify_state.num_read.tolist() == [1, 0]
    assert refilled.verify_state.log_normalizer[1] == np.inf
    with pytest.raises(ValueError, match="Was the state made by `init` with another `verify_fn`"):
        jax.eval_shape(unexported, jax.random.key(0), state._replace(verify_state=()))


@pytest.mark.optimised(True)  # runs for longer than it compiles
@pytest.mark.both_programs(False)
def test_generate_returns_the_state_and_a_large_margin_is_exact(assert_law):
    options = {"max_new_tokens": 3, **MODELS, "verify_fn": ss.CalibratedRule(margin=3.0)}
    prompt = [1, 2, 1]
    text = ss.generate(jax.random.key(11), np.tile(prompt, (8_000, 1)), **options)

    def target(prefix):
        return oracle.distribution(tables.logits_after(TARGET, [*prompt, *prefix]).astype(float))

    assert_law(text.tokens[:, 3:], oracle.target_law(target, 3))
    # All estimates were too high, and still some drafts were accepted.
    assert text.verify_state.max_bound.max() == 0
    assert text.verify_state.num_decided.sum() > 500
    assert text.stats.num_accepted.sum() > 100
