"""The `specsamp` command."""

import sys

import click

from specsamp_jax.cli.demo import demo_command
from specsamp_jax.cli.generate import generate_command
from specsamp_jax.cli.transcribe import transcribe_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="specsamp")
def cli() -> None:
    """Exact speculative sampling in JAX."""


cli.add_command(demo_command)
cli.add_command(generate_command)
cli.add_command(transcribe_command)


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
