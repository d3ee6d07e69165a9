"""`certify`: exact rules pass; rules with faults seen in other libraries fail, each in the check made for its fault."""

import functools
import inspect
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.certificate import checks, law
from specsamp_jax.certificate.models import certify_models
from specsamp_jax.certificate.report import Certificate, Check, check_law

pytestmark = [pytest.mark.optimised(False), pytest.mark.both_programs(False)]


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr(checks, "NUM_BATCHES", 32)
    monkeypatch.setattr(checks, "LARGE_NUM_BATCHES", 32)


def probs(logits, sampling):
    """Softmax with a temperature; one-hot at temperature 0."""
    temperature = jnp.reshape(sampling.temperature, (-1, 1, 1)) * jnp.ones((logits.shape[0], 1, 1))
    greedy = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    return jnp.where(temperature == 0, greedy, jax.nn.softmax(logits / jnp.where(temperature == 0, 1, temperature)))


def drafter_probs(draft, sampling, vocab_size):
    """q at each position: one-hot for a deterministic draft, zero for a missing draft, which is never accepted."""
    q = jax.nn.one_hot(draft.tokens, vocab_size) if draft.logits is None else probs(draft.logits, sampling)
    return jnp.where(draft.tokens[..., None] < 0, 0, q)


def strictly(u, p, q):
    return u * q < p


def textbook(
    key, target_logits, draft, sampling, *, accept=strictly, residual=lambda p, q: jnp.maximum(p - q, 0), noise_key=None
):
    """Leviathan et al., algorithm 1, in plain JAX. The keyword arguments replace parts of it by faulty ones."""
    uniform_key, token_key = jax.random.split(key)
    if noise_key is not None:
        uniform_key, token_key = noise_key(key)
    batch_size, num_draft = draft.tokens.shape
    p = probs(target_logits, sampling)
    q = drafter_probs(draft, sampling, p.shape[-1])
    at = jnp.maximum(draft.tokens, 0)[..., None]
    p_x, q_x = (jnp.take_along_axis(rows, at, -1)[..., 0] for rows in (p[:, :-1], q))
    u = jax.random.uniform(uniform_key, (batch_size, num_draft))
    accepted = accept(u, p_x, q_x) & (draft.tokens >= 0)
    n = jnp.cumprod(accepted, axis=1).sum(1)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    p_n, q_n = (jnp.take_along_axis(rows, n[:, None, None], 1)[:, 0] for rows in (p, q))
    weights = residual(p_n, q_n)
    token = jax.random.categorical(token_key, jnp.log(jnp.where(weights.sum(-1, keepdims=True) > 0, weights, p_n)))
    return emitted(draft.tokens, n, token)


def emitted(drafts, n, token):
    position = jnp.arange(drafts.shape[1] + 1)
    drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
    tokens = jnp.where(position < n[:, None], drafts, jnp.where(position == n[:, None], token[:, None], -1))
    return ss.Verification(tokens, n, None, None, None)


def drawn(key, logits, sampling):
    """Samples drafts without filters: a tenth of the program that `ss.sample` is. `textbook` splits the same keys."""
    weights = probs(logits[:, None], sampling)[:, 0]
    return jax.random.categorical(jax.random.fold_in(key, 99), jnp.log(weights)), None


def failed(certificate):
    return {check.name for check in certificate.checks if check.passed is False}


TEXTBOOK_CHECKS = [name for name in checks.CHECKS if name != "filtered"]  # `textbook` has no filters


# Exact rules


def test_the_textbook_rule_passes():
    certificate = ss.certify(textbook, draft_fn=drawn, checks=TEXTBOOK_CHECKS)
    assert certificate.passed, str(certificate)
    assert len(certificate.checks) == len(TEXTBOOK_CHECKS) + 4


@pytest.fixture
def few_draws(monkeypatch):
    """Few draws of rules whose laws the tests of the rules enumerate."""
    monkeypatch.setattr(checks, "NUM_BATCHES", 8)
    monkeypatch.setattr(checks, "LARGE_NUM_BATCHES", 8)


@pytest.mark.both_programs
def test_the_token_rule_passes_what_the_textbook_rule_does_not_implement(few_draws):
    certificate = ss.certify(ss.verify, checks=["filtered"])
    assert certificate.passed, str(certificate)


@pytest.mark.slow
@pytest.mark.optimised(True)
@pytest.mark.parametrize("rule", [ss.verify, ss.verify_block])
def test_our_exact_rules_pass(rule, few_draws):
    certificate = ss.certify(rule)
    assert certificate.passed, str(certificate)
    assert {check.name for check in certificate.checks} >= {"sampled", "filtered", "greedy rows", "large", "acceptance"}


@pytest.mark.slow
@pytest.mark.optimised(True)
def test_the_coupled_rule_passes_where_its_drafts_have_the_same_noise():
    certificate = ss.certify(ss.verify_coupled, draft_fn=ss.sample_coupled, checks=["same key"])
    assert certificate.passed, str(certificate)


@pytest.mark.slow
def test_the_coupled_rule_passes():
    certificate = ss.certify(ss.verify_coupled)
    assert certificate.passed, str(certificate)


# Faulty rules


def test_an_inclusive_comparison_fails_where_all_random_bits_are_zero():
    rule = functools.partial(textbook, accept=lambda u, p, q: u * q <= p)
    assert failed(ss.certify(rule, checks=["boundary"])) == {"boundary, all bits 0"}


def categorical(key, logits, sampling):
    """Samples drafts with `jax.random.categorical`. The check "same key" calls it with the key of the rule."""
    return jax.random.categorical(key, logits), None


def test_noise_shared_between_draft_and_verification_fails():
    shared = functools.partial(textbook, noise_key=lambda key: (jax.random.split(key)[0], key))
    certificate = ss.certify(shared, draft_fn=categorical, checks=["sampled", "same key"])
    assert failed(certificate) == {"same key"}


def test_a_residual_without_q_fails():
    rule = functools.partial(textbook, residual=lambda p, q: p)
    assert failed(ss.certify(rule, draft_fn=drawn, checks=["sampled", "large"])) == {"sampled", "large"}


def test_the_sigmoid_rule_fails_and_accepts_more_than_any_exact_rule():
    assert failed(ss.certify(ss.verify_sigmoid, draft_fn=drawn, checks=["sampled", "large"])) == {
        "sampled",
        "large",
        "acceptance",
    }


def test_greedy_drafts_verified_with_softmax_probabilities_fail():
    """As in keras-hub: the drafter is greedy, but q in the ratio p/q is the softmax of its logits."""

    def greedy(key, logits, sampling):
        return logits.argmax(-1), None

    assert failed(ss.certify(textbook, draft_fn=greedy, checks=["sampled"])) == {"sampled"}


def inverted_greedy(key, target_logits, draft, sampling):
    """A fault reported for tpu-inference: beside sampled rows, a greedy row accepts drafts that it should reject."""
    result = textbook(key, target_logits, draft, sampling)
    best = target_logits.argmax(-1)
    n = jnp.cumprod(draft.tokens != best[:, :-1], axis=1).sum(1)
    inverted = emitted(draft.tokens, n, jnp.take_along_axis(best, n[:, None], 1)[:, 0])
    greedy = jnp.ravel(sampling.temperature) == 0
    tokens = jnp.where(greedy[:, None], inverted.tokens, result.tokens)
    return result._replace(tokens=tokens, num_accepted=jnp.where(greedy, n, result.num_accepted))


def test_an_inverted_greedy_row_fails():
    assert failed(ss.certify(inverted_greedy, draft_fn=drawn, checks=["sampled", "greedy rows"])) == {"greedy rows"}


def test_equal_random_numbers_in_all_rows_fail():
    def rule(key, target_logits, draft, sampling):
        def first(logits, tokens, draft_logits, temperature):
            row = ss.Draft(tokens[None], draft_logits[None])
            result = textbook(key, logits[None], row, ss.SamplingParams(temperature[None]))
            return result.tokens[0], result.num_accepted[0]

        rows = target_logits, draft.tokens, draft.logits, sampling.temperature
        return ss.Verification(*jax.vmap(first)(*rows), None, None, None)

    assert "rows are independent" in failed(ss.certify(rule, draft_fn=drawn, checks=["rows"]))


def test_a_key_that_is_ignored_fails():
    def rule(key, *arguments):
        return textbook(jax.random.key(0), *arguments)

    assert failed(ss.certify(rule, draft_fn=drawn, checks=["keys"])) == {"keys"}


def test_tokens_without_padding_fail():
    def rule(*arguments):
        result = textbook(*arguments)
        return result._replace(tokens=jnp.maximum(result.tokens, 0))

    assert failed(ss.certify(rule, draft_fn=drawn, checks=["form"])) == {"form"}


def test_a_check_that_a_rule_does_not_implement_does_not_count():
    def rule(key, target_logits, draft, sampling):
        if draft.logits is None:
            raise NotImplementedError("drafts need logits")
        return textbook(key, target_logits, draft, sampling)

    certificate = ss.certify(rule, draft_fn=drawn, checks=["form", "deterministic"])
    assert [check.passed for check in certificate.checks] == [True, None]
    assert certificate.passed
    assert "drafts need logits" in str(certificate)
    assert not ss.certify(rule, checks=["deterministic"]).passed, "nothing was certified"


def test_an_unknown_check_raises_an_error():
    with pytest.raises(ValueError, match=r"checks must be among form, sampled, .*; got law"):
        ss.certify(textbook, checks=["law"])


# Statistics


@pytest.mark.parametrize(
    ("options", "message"),
    [
        # No check would pass without a look at the rule.
        ({"checks": []}, "checks must be None, or a list of at least one of form"),
        ({"checks": "form"}, "got 'form'."),
        ({"verify_fn": "verify"}, "verify_fn must be a function, such as specsamp_jax.verify or sample; got 'verify'."),
        ({"draft_fn": None}, "draft_fn must be a function"),
        ({"seed": -1}, "seed must be at least 0; got -1."),
        ({"seed": "1"}, "seed must be a Python int of at least 0; got str."),
    ],
)
def test_wrong_arguments_are_reported(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        inspect.unwrap(ss.certify)(**{"verify_fn": ss.verify} | options)


def test_the_interval_covers_the_true_distance_and_shrinks():
    rng, exact = np.random.default_rng(0), np.array([0.5, 0.3, 0.2])
    for wrong, distance in ((exact, 0.0), (np.array([0.4, 0.3, 0.3]), 0.1)):
        widths = []
        for n in (10_000, 1_000_000):
            check = check_law("law", rng.multinomial(n, wrong), exact)
            low, high = check.interval
            assert low <= distance <= high
            assert check.passed == (distance == 0)
            widths.append(high - low)
        assert widths[1] < 0.2 * widths[0]
    assert not check_law("law", np.array([9000, 1]), np.array([1.0, 0.0])).passed, "probability zero"


def test_completed_texts_have_the_targets_law():
    p = law.probs(law.table(1, 1.5))
    texts = law.complete(np.full((40_000, law.NUM_DRAFT + 1), -1), p, 0)
    expected = law.text_law(p)
    assert expected.sum() == pytest.approx(1)
    assert check_law("own", np.bincount(law.text_index(texts), minlength=len(expected)), expected).passed


def test_filters_of_the_certificate_equal_the_oracle():
    logits = law.table(3, 2.0).reshape(-1, law.VOCAB)
    # One filter at a time, for together the others remove what one would.
    for setting in (
        {"temperature": 0.8, "top_k": 3, "top_p": 0.9, "min_p": 0.1},
        {"top_k": 2},
        {"top_p": 0.6},
        {"min_p": 0.3},
    ):
        expected = [oracle.distribution(row, **setting) for row in logits]
        np.testing.assert_allclose(law.probs(logits, **setting), expected)


# Models, table, plot


def test_two_models_fail_with_the_sigmoid():
    """tests/cli/test_certify_cli.py has two that pass."""
    target, draft = tables.model(tables.table(3)), tables.model(tables.table(4))
    wrong = certify_models(target, draft, [1, 2], num_batches=8, verify_fn=ss.verify_sigmoid)
    assert failed(wrong) == {"first token", "acceptance"}


CERTIFICATE = Certificate(
    (
        Check("sampled", True, "fine", 1000, 0.01, (0.0, 0.02), 0.5),
        Check("keys", False, "not fine"),
        Check("filtered", None, "not implemented by the rule: no"),
    )
)


def test_the_table_has_a_row_per_check():
    lines = str(CERTIFICATE).splitlines()
    assert len(lines) == 4
    assert lines[1].split() == ["sampled", "passed", "1,000", "0.0100", "0.0000", "to", "0.0200", "0.5", "fine"]
    assert lines[2].split() == ["keys", "FAILED", "not", "fine"]
    assert not CERTIFICATE.passed


def test_a_plot_without_matplotlib_raises_an_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="needs matplotlib, which is not installed"):
        CERTIFICATE.plot(tmp_path / "plot.svg")


def test_a_plot_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    CERTIFICATE.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").stat().st_size > 1000
