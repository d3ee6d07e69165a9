"""Output shared by the subcommands: progress on standard error, tables."""

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Says on standard error what takes its time, and how long it took."""
    click.secho(f"{what} ... ", nl=False, err=True, dim=True)
    began = time.perf_counter()
    yield
    click.secho(f"{time.perf_counter() - began:.1f} s", err=True, dim=True)


def primed(items: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The same items, the first of them made at once."""
    return itertools.chain(list(itertools.islice(items, 1)), items)


def table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        click.echo("  " + "   ".join(cells).rstrip())
