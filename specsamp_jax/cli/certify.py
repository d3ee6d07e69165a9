"""`specsamp certify`: shows whether a verification rule, or two models with it, keep the target's distribution."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from specsamp_jax._types import Model
from specsamp_jax.certificate.checks import CHECKS, certify
from specsamp_jax.certificate.models import certify_models
from specsamp_jax.certificate.report import Certificate
from specsamp_jax.cli import generation
from specsamp_jax.cli.cache import cache_option
from specsamp_jax.cli.shared import DTYPES, FOLDER, Text, doing, seed_option, verbosity_options
from specsamp_jax.rules.verify import verify, verify_block, verify_coupled, verify_sigmoid

RULES: dict[str, Callable[..., Any]] = {
    "token": verify,
    "block": verify_block,
    "coupled": verify_coupled,
    "sigmoid": verify_sigmoid,
}


@click.command("certify")
@click.option(
    "--verify", "rule", default="token", show_default=True, help=f"{', '.join(RULES)}, or MODULE:FUNCTION of your own."
)
@click.option("--check", "checks", type=click.Choice(list(CHECKS)), multiple=True, help="Only these checks.")
@click.option("--target", type=FOLDER, help="Checkpoint, as in generate: certify a step of two models.")
@click.option("--draft", type=Text(), help="Checkpoint of its drafter.")
@click.option("--tokenizer", type=FOLDER, help="Checkpoint with the tokenizer. Default: the target's.")
@click.option("--prompt", type=Text(), default="The", show_default=True, help="The text before the step.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the models. Default: the checkpoint's.")
@click.option("--plot", type=FOLDER, help="File for a plot of the distances; needs matplotlib.")
@seed_option
@cache_option
@verbosity_options
def certify_command(
    rule: str,
    checks: tuple[str, ...],
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    prompt: str,
    dtype: str | None,
    plot: Path | None,
    seed: int,
) -> None:
    """Check that a rule, or a target with a drafter, is exact.

    Draws many steps and holds them against enumerated laws. Exits with status 1 if a check fails.
    """
    if (target is None) != (draft is None):
        raise click.UsageError("'--target' and '--draft' go together: one of them is missing.")
    if target is not None and checks:
        raise click.UsageError("'--check' is for a rule alone, without '--target'.")
    verify_fn = _rule(rule)
    if target is None:
        with doing(f"drawing and checking steps of {rule}"):
            certificate = certify(verify_fn, checks=checks or None, seed=seed)
    else:
        certificate = _of_models(generation.load(target, draft, tokenizer, dtype=dtype), prompt, verify_fn, seed)
    click.echo(str(certificate))
    if plot is not None:
        certificate.plot(plot)
    if not certificate.passed:
        raise click.ClickException(f"{rule} failed: its text does not have the target's distribution")
    click.echo(f"\n{rule} passed: no evidence that its text differs from the target's in distribution")


def _rule(name: str) -> Callable[..., Any]:
    """The rule of that name, or the function of a module.

    Raises:
      ValueError: There is no such rule or function.
    """
    if name in RULES:
        return RULES[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"--verify must be {', '.join(RULES)}, or MODULE:FUNCTION; got {name!r}.")
    sys.path.insert(0, "")
    try:
        found = vars(importlib.import_module(module)).get(function)
    except ImportError as error:
        raise ValueError(f"--verify {name!r}: {error}.") from error
    if not callable(found):
        raise ValueError(f"--verify {name!r}: {module} has no function {function!r}.")
    return found


def _of_models(setup: generation.Setup, prompt: str, verify_fn: Callable[..., Any], seed: int) -> Certificate:
    """The certificate of two checkpoints with a rule, at temperature 1 without filters."""
    if not isinstance(setup.draft, Model):
        raise click.UsageError("'--draft' must be the folder of a model: without one there is no acceptance to check.")
    tokens = setup.tokenizer.encode(prompt)
    with doing(f"drawing and checking steps after {len(tokens)} tokens"):
        return certify_models(setup.target, setup.draft, tokens, verify_fn=verify_fn, seed=seed)
