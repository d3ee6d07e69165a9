"""Options `--verify`, `--alpha` and `--beta` of the subcommands, and the message about a rule that is not exact."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import click
import numpy as np

from specsamp_jax.cli.shared import Finite, warn
from specsamp_jax.decoding.stateful_rule import VerifyFn
from specsamp_jax.rules.calibration import CalibratedRule, Calibration
from specsamp_jax.rules.verify import verify, verify_block, verify_coupled, verify_sigmoid


def _describe_sigmoid(states: Sequence[Any]) -> str:
    return "its text follows the drafter more than the target"


def _describe_calibrated(states: Sequence[Calibration]) -> str:
    """The errors of the estimates, over the rows of all batches."""
    decided, bounds, errors = (
        sum(float(np.sum(getattr(state, name))) for state in states)
        for name in ("num_decided", "sum_bound", "sum_error")
    )
    if not decided:
        return "but here no draft was decided by an estimate"
    largest = max(float(np.max(state.max_bound, initial=0)) for state in states)
    return (
        f"its estimates were off by {errors / decided:.2f} nats on average, and each token's distribution differs from "
        f"the target's by at most {bounds / decided:.3f} on average, {largest:.3f} at worst (total variation; "
        f"{decided:.0f} drafts)"
    )


class Rule(NamedTuple):
    """A choice of `--verify`.

    Attributes:
      make_fn: Returns the rule; takes the options in `options` by name.
      options: Names of the options that belong to the rule.
      describe_fn: Says in a clause, from the rule's state of each batch, how far its text is from the target's. None:
        the rule is exact.
      needs_drafts: Whether the rule is refused without a drafter, where it has no drafts to decide.
    """

    make_fn: Callable[..., VerifyFn]
    options: tuple[str, ...] = ()
    describe_fn: Callable[[Sequence[Any]], str] | None = None
    needs_drafts: bool = True


def _sigmoid(**options: float) -> VerifyFn:
    return functools.partial(verify_sigmoid, **options) if options else verify_sigmoid


RULES = {
    "token": Rule(lambda: verify, needs_drafts=False),
    "block": Rule(lambda: verify_block),
    "coupled": Rule(lambda: verify_coupled, needs_drafts=False),
    "sigmoid": Rule(_sigmoid, ("alpha", "beta"), _describe_sigmoid),
    "calibrated": Rule(CalibratedRule, (), _describe_calibrated),
}
"""The rules by the names that `--verify` takes."""

_HELP = {
    "alpha": "Of sigmoid: the logit with score one half. Default: -10000, as in the paper's released code.",
    "beta": "Of sigmoid: alpha plus the width. Default: 10000, so that the width is 20000.",
}


def rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--verify` and the options of single rules; the command takes them as `rule`, `alpha` and `beta`."""
    for name, text in reversed(_HELP.items()):
        command = click.option(f"--{name}", type=Finite(), help=text)(command)
    option = click.option(
        "--verify",
        "rule",
        type=click.Choice(list(RULES)),
        default="token",
        show_default=True,
        help="Verification rule. token, block and coupled are exact, sigmoid and calibrated approximate.",
    )
    return option(command)


def make_rule(name: str, *, has_drafter: bool, **options: float | None) -> VerifyFn:
    """Returns the rule.

    Args:
      name: Its name in `RULES`.
      has_drafter: Whether tokens are drafted.
      options: The values of the options of single rules; None where one was not given.

    Raises:
      UsageError: An option is for another rule, or there are no drafts to verify.
    """
    rule, chosen = RULES[name], {option: value for option, value in options.items() if value is not None}
    for option in chosen:
        if option not in rule.options:
            owners = " or ".join(f"'--verify {other}'" for other, its in RULES.items() if option in its.options)
            raise click.UsageError(f"'--{option}' is for {owners}; got '--verify {name}'.")
    if rule.needs_drafts and not has_drafter:
        raise click.UsageError(f"'--verify {name}' decides drafts, and there is no drafter.")
    low, high = chosen.get("alpha", -1e4), chosen.get("beta", 1e4)
    if not high > low:
        raise click.UsageError(f"'--beta' must be above '--alpha'; got {high:g} and {low:g}.")
    return rule.make_fn(**chosen)


def warn_about_rule(name: str, states: Sequence[Any], *, is_greedy: bool) -> None:
    """Writes a message if the rule is not exact.

    Args:
      name: Its name in `RULES`.
      states: Its state after each batch.
      is_greedy: Whether the temperature is 0.
    """
    describe_fn = RULES[name].describe_fn
    if describe_fn is None:
        return
    reason = "but at temperature 0 every rule gives the same text" if is_greedy else describe_fn(states)
    separator = ", " if reason.startswith("but ") else ": "
    warn(f"the {name} rule is approximate{separator}{reason}")
