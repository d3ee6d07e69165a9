"""Option types, messages and checks that the subcommands share."""

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, Stats
from specsamp_jax.decoding.stats import accepted_by_position

DTYPES = ("float32", "bfloat16", "float16")
FOLDER = click.Path(path_type=Path)
TOP_K = click.IntRange(0, 2**31 - 1)


class Text(click.ParamType):
    """A text; refuses bytes on the command line that are not text."""

    name = "text"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Returns the text."""
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.fail(f"byte {ord(value[error.start]) & 0xFF:#04x} in {value!r} is not text in UTF-8.", param, ctx)
        return value


class Finite(click.types.FloatParamType):
    """A number that is not NaN and not infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        return _finite(self, super().convert(value, param, ctx), param, ctx)


class FiniteRange(click.FloatRange):
    """A range of numbers without NaN and infinity."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Returns the number."""
        return _finite(self, super().convert(value, param, ctx), param, ctx)


def _finite(kind: click.ParamType, number: float, param: click.Parameter | None, ctx: click.Context | None) -> float:
    if not math.isfinite(number):
        kind.fail(f"{number} is not a finite number.", param, ctx)
    return number


def seed_option(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--seed`."""
    seeds = click.IntRange(0, 2**31 - 1)
    return click.option("--seed", type=seeds, default=0, show_default=True, help="Random seed.")(command)


_VERBOSITY = "specsamp_jax.verbosity"


def verbosity_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--verbose` and `--quiet`; without them messages are written if standard output is a terminal."""
    for name, help_text in (
        ("quiet", "No messages but warnings; the default where standard output is no terminal."),
        ("verbose", "Messages, with details, wherever standard output goes."),
    ):
        # Eager: before the callbacks of other options, which may write messages.
        option = click.option(
            f"--{name}", is_flag=True, is_eager=True, expose_value=False, callback=_set_verbosity, help=help_text
        )
        command = option(command)
    return command


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSITY] = param.name


def is_verbose() -> bool:
    """Whether `--verbose` was given."""
    return _chosen_verbosity() == "verbose"


def talks() -> bool:
    """Whether messages are written: with `--verbose`, or to a terminal without `--quiet`."""
    return is_verbose() or (_chosen_verbosity() is None and stdout_is_terminal())


def stdout_is_terminal() -> bool:
    """Whether a person reads standard output as it is written."""
    return sys.stdout.isatty()


def stderr_is_terminal() -> bool:
    """Whether a line on standard error can be rewritten."""
    return sys.stderr.isatty()


def _chosen_verbosity() -> str | None:
    ctx = click.get_current_context(silent=True)
    return None if ctx is None else ctx.meta.get(_VERBOSITY)


def say(message: str) -> None:
    """Writes a message to standard error if `talks`; standard output is for text."""
    if talks():
        warn(message)


def warn(message: str) -> None:
    """Writes a message to standard error in any case."""
    click.secho(message, err=True, dim=True)


@contextmanager
def doing(task: str) -> Iterator[Callable[[int, int], None]]:
    """Writes to standard error, if `talks`, the name of a task, and the seconds it took when it is done.

    Yields `(done, total) -> None`, which writes the share that is done if standard error is a terminal; the next share,
    or the seconds, replaces it.
    """
    if not talks():
        yield lambda done, total: None
        return
    click.secho(f"{task} ... ", nl=False, err=True, dim=True)
    began, outcome, shown = time.perf_counter(), "failed", ""

    def show(text: str, *, end: bool) -> None:
        nonlocal shown
        click.secho("\b" * len(shown) + text.ljust(len(shown)), err=True, dim=True, nl=end)
        shown = text

    def progress(done: int, total: int) -> None:
        share = f"{done / total:.0%}"
        if share != shown and stderr_is_terminal():
            show(share, end=False)

    try:
        yield progress
        outcome = f"{time.perf_counter() - began:.1f} s"
    finally:
        show(outcome, end=True)


def primed(items: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Returns the same items after computing the first."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns, the first aligned left and the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        click.echo("  " + "   ".join(cells).rstrip())


def acceptance_line(stats: Stats) -> str | None:
    """Returns the drafts of a decoding loop in one line; None if there were none."""
    drafted, accepted = np.asarray(stats.num_drafted), np.asarray(stats.num_accepted)
    if not drafted.sum():
        return None
    rates = " ".join(f"{rate:.2f}" for rate in accepted_by_position(drafted, accepted))
    return (
        f"{drafted.sum()} tokens drafted, {accepted.sum()} accepted; by position, given that all before were accepted: "
        f"{rates}"
    )


def check_target(stats: Stats, name: str = "text", first: int = 0) -> None:
    """Raises ClickException if the target gave a degenerate row: its tokens are then not samples of anything.

    Args:
      stats: The counts of a batch.
      name: A word for its rows.
      first: The index of its first row among all.
    """
    rows = np.flatnonzero(np.asarray(stats.status) & DEGENERATE_TARGET)
    if rows.size:
        numbers = ", ".join(str(first + row + 1) for row in rows)
        raise click.ClickException(
            f"the target's logits for {name} {numbers} hold NaN or +inf, or are all -inf: there is nothing to sample "
            "from. Its weights may be damaged, or too large for the dtype, or the settings forbid every token."
        )


def warn_about_draft(stats: Stats) -> None:
    """Writes a message if the drafter gave a degenerate row; the text has the target's distribution all the same."""
    if (np.asarray(stats.status) & DEGENERATE_DRAFT).any():
        warn("the drafter's logits hold NaN or +inf, or are all -inf, at some steps: those drafts were rejected")
