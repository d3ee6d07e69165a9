"""`specsamp certify`: a table, and exit status 1 if a rule fails."""

import functools

import pytest

from specsamp_jax.certificate import checks
from specsamp_jax.certificate.models import certify_models
from specsamp_jax.cli import certify

pytestmark = pytest.mark.optimised(False)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    monkeypatch.setattr(checks, "NUM_BATCHES", 8)


def test_an_exact_rule_passes(run):
    status, text, _ = run("certify", "--check", "boundary")
    assert status == 0
    assert "boundary, all bits 0" in text
    assert "token passed: no evidence that its text differs" in text


def test_a_rule_that_fails_has_exit_status_1(run):
    status, text, errors = run("certify", "--verify", "sigmoid", "--check", "sampled")
    assert status == 1
    assert "FAILED" in text
    assert "specsamp: sigmoid failed: its text does not have the target's distribution" in errors


WITHOUT_DRAFTS = """
import jax.numpy as jnp
import specsamp_jax as ss

def rule(key, target_logits, draft, sampling):
    tokens = jnp.pad(target_logits[:, :1].argmax(-1), ((0, 0), (0, draft.tokens.shape[1])), constant_values=-1)
    return ss.Verification(tokens, jnp.zeros(len(tokens), int), None, None, None)
"""


def test_a_function_of_a_module_is_certified(run, tmp_path, monkeypatch):
    (tmp_path / "own_rule.py").write_text(WITHOUT_DRAFTS)
    monkeypatch.chdir(tmp_path)
    status, text, _ = run("certify", "--verify", "own_rule:rule", "--check", "boundary")
    assert status == 0
    assert "own_rule:rule passed" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--verify", "best"), "--verify must be token, block, coupled, sigmoid, or MODULE:FUNCTION; got 'best'."),
        (("--verify", "no_such_module:f"), "No module named 'no_such_module'"),
        (("--verify", "specsamp:f"), "specsamp has no function 'f'"),
        (("--target", "folder"), "'--target' and '--draft' go together: one of them is missing."),
    ],
)
def test_wrong_options_are_told(run, options, message):
    status, _, errors = run("certify", *options)
    assert status == 2
    assert message in errors


def test_two_checkpoints_are_certified(run, monkeypatch, one_layer_pair):
    monkeypatch.setattr(certify, "certify_models", functools.partial(certify_models, num_batches=2))
    target, drafter = (one_layer_pair / name for name in ("target", "drafter"))
    folders = "--target", target, "--draft", drafter, "--tokenizer", one_layer_pair
    status, text, _ = run("certify", *folders, "--prompt", "Return the", "--dtype", "float32")
    assert status == 0
    assert "of the first drafts accepted, sum min(p, q) is" in text
