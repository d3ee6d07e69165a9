"""The `specsamp` command."""

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
import jax

from specsamp_jax import _demo
from specsamp_jax._generate_cli import generate_command
from specsamp_jax._transcribe_cli import transcribe_command
from specsamp_jax.pair import load_pair

FALSE_ALARM = 1e-3  # how often the demo may cry wolf, over seeds
COLOURS = {"accepted": "green", "residual": "red", "bonus": "cyan"}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="specsamp")
def cli() -> None:
    """Exact speculative sampling in JAX."""


cli.add_command(generate_command)
cli.add_command(transcribe_command)


@cli.command()
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of all the chance.")
def demo(seed: int) -> None:
    """Continue a held-out docstring, measure the gain, and check that the text is the target's own."""
    began = time.perf_counter()
    with doing("loading the trained pair"):
        pair = load_pair()
        prompts = _demo.held_out_prompts(pair, seed)
    first = prompts[0]
    with doing("compiling the speculative step"):
        pieces = primed(_demo.continuation(pair, first.tokens, jax.random.key(seed)))
    click.echo(f"\n{click.style(first.name, bold=True)}, a docstring from a file that was not trained on,")
    click.echo(f"continued at temperature 1, {_demo.NUM_DRAFT} drafts a step:")
    click.echo("  ".join(["the prompt", *(click.style(kind, fg=colour) for kind, colour in COLOURS.items())]) + "\n")
    click.echo(first.text, nl=False)
    for text, kind in pieces:
        click.secho(text, fg=COLOURS[kind], nl=False)
    click.echo("\n")

    with doing(f"continuing {len(prompts)} held-out docstrings with speculation and without"):
        speculative, alone = _demo.race(pair, prompts, seed)
    with doing(f"drawing {_demo.NUM_CHECKED:,} speculative tokens after one context"):
        check = _demo.check_exactness(pair, first.tokens, seed)

    click.echo(f"\nOn {jax.devices()[0].device_kind}, one prompt at a time, {_demo.NEW_TOKENS} tokens each:\n")
    runs = [(run.name, f"{run.tokens_a_second:.0f}", f"{run.tokens_a_step:.2f}") for run in (speculative, alone)]
    table([("", "tokens a second", "tokens a step"), *runs])
    positions = [str(i + 1) for i in range(len(speculative.acceptance))]
    click.echo()
    table([("draft position", *positions), ("accepted", *(f"{rate:.2f}" for rate in speculative.acceptance))])
    click.echo(f"\nIs it the target's own distribution? {check.num_samples:,} tokens after one context:\n")
    table([("token", "counted", "expected"), *check.rows(pair.tokenizer)])
    verdict = "nothing speaks against it" if check.p_value > FALSE_ALARM else "it is NOT"
    click.echo(
        f"\nchi-square {check.statistic:.1f} on {check.degrees} degrees of freedom, p = {check.p_value:.3f}: {verdict}"
    )
    click.echo(f"{time.perf_counter() - began:.0f} seconds in all")


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


def main() -> None:
    """Runs the command; what is wrong with an option is told in one sentence."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        click.echo(f"specsamp: {error.format_message()}", err=True)
        sys.exit(2)
    except click.Abort:
        sys.exit(130)
