"""Options of `specsamp transcribe` for silence and for windows that are decoded again."""

import math
from collections.abc import Callable

import click

from specsamp_jax.cli.shared import FiniteRange
from specsamp_jax.speech import Fallback

OFF = "off"
_DEFAULT = Fallback()


class Temperatures(click.ParamType):
    """Temperatures with commas between them, the first one first."""

    name = "numbers"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        """Returns the temperatures."""
        if isinstance(value, tuple):
            return value
        return tuple(FiniteRange(0).convert(part.strip(), param, ctx) for part in value.split(","))


class Threshold(click.ParamType):
    """A finite number, or None for `off`."""

    name = f"float|{OFF}"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        """Returns the number."""
        if value == OFF:
            return None
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number or {OFF!r}.", param, ctx)
        return number


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--temperature` and the thresholds of `Fallback`."""
    thresholds = (
        ("no_speech_threshold", "Probability of 'no speech' above which an improbable window has no text."),
        ("logprob_threshold", "Mean log-probability below which a window is decoded again."),
        ("compression_ratio_threshold", "Ratio by zlib above which a window, being repetitive, is decoded again."),
    )
    for name, text in thresholds:
        option = click.option(
            "--" + name.replace("_", "-"),
            type=Threshold(),
            default=getattr(_DEFAULT, name),
            show_default=True,
            help=f"{text} {OFF}: never.",
        )
        command = option(command)
    option = click.option(
        "--temperature",
        "temperatures",
        type=Temperatures(),
        default=",".join(f"{value:g}" for value in (0, *_DEFAULT.temperatures)),
        show_default=True,
        help="0 is greedy. After the first, those at which a window is decoded again; one alone: never.",
    )
    return option(command)
