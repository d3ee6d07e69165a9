"""Draft length on the command line: a number, or `auto`, which measures the machine and drafts as many as pay."""

from typing import Any

import click

from specsamp_jax.cli.shared import doing, say
from specsamp_jax.decoding.costs import forced, measure_goodput
from specsamp_jax.decoding.generate import stream
from specsamp_jax.decoding.goodput import GoodputNumDraft

AUTO = "auto"
LENGTHS = (0, 1, 2, 4)
"""Draft lengths of `auto`; a step is compiled for each."""


class NumDraft(click.IntRange):
    """A number from 0 to 32, or `auto`."""

    name = "number or auto"

    def __init__(self):
        super().__init__(0, 32)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the number, or `AUTO`."""
        return AUTO if value == AUTO else super().convert(value, param, ctx)


Choice = int | str | GoodputNumDraft
"""A number, `AUTO`, or the rule that `AUTO` became."""


def resolve(num_draft: Choice, prompt: Any, **options: Any) -> int | GoodputNumDraft:
    """Returns the number or the rule; for `AUTO` a rule measured for `stream` with these arguments."""
    if not isinstance(num_draft, str):
        return num_draft
    if options["draft"] is None:
        return 0
    with doing("measuring steps of " + ", ".join(map(str, LENGTHS)) + " drafts"):
        rule = measure_goodput(prompt, lengths=LENGTHS, decode_fn=stream, **options)
    say(describe(rule.costs))
    return rule


def program(num_draft: Choice, draft: Any) -> int | GoodputNumDraft:
    """Returns a number or rule that runs the same program as that of `resolve`, without measuring."""
    if not isinstance(num_draft, str):
        return num_draft
    return 0 if draft is None else forced(LENGTHS, 0)


def describe(costs: tuple[float, ...]) -> str:
    """Returns the costs in one line."""
    longer = ", ".join(f"{cost / costs[0]:.2f}" for cost in costs[1:])
    names = ", ".join(map(str, LENGTHS[1:]))
    return f"a step without drafts takes {1e3 * costs[0]:.2f} ms; steps of {names} drafts {longer} times as long"
