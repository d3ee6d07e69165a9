"""JAX's persistent compilation cache, which the commands use by default, and sizes that let programs be used again."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import jax

from specsamp_jax.cli.shared import is_verbose, say, warn
from specsamp_jax.sampling.dispatch import for_this_machine

OFF = "off"
"""Value of `--cache` for no cache."""

_STEP = 512  # of large sizes, whose caches take gigabytes


def cache_option(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--cache`, which takes effect before the command runs. Its programs are for this machine alone."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        with for_this_machine(True):
            command(**arguments)

    return click.option(
        "--cache",
        envvar="SPECSAMP_CACHE",
        help=f"Folder of compiled programs, or {OFF!r}. Default: specsamp in the user's cache directory.",
        expose_value=False,
        callback=_use,
    )(run)


def default_folder() -> Path:
    """Returns `specsamp/programs` in the user's cache directory: `XDG_CACHE_HOME` if it is an absolute path."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "specsamp" / "programs"


def padded_size(size: int) -> int:
    """Returns the smallest of 32, 48, 64, 96, 128, 192, ..., 1024, 1536, 2048, 2560, ... that is at least `size`.

    Prompts and caches of these sizes share compiled programs, and are at most half as large again as needed.

    Example:
      >>> [padded_size(size) for size in (1, 33, 49, 97, 128, 129, 2049)]
      [32, 48, 64, 128, 128, 192, 2560]
    """
    if size > _STEP:
        return -(-size // _STEP) * _STEP
    power = 1 << max(size - 1, 31).bit_length()
    return power * 3 // 4 if power > 32 and size <= power * 3 // 4 else power


def _use(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Switches the cache on, unless it is off or JAX's own setting names a folder."""
    if value == OFF:
        return
    if value is None and jax.config.jax_compilation_cache_dir is not None:
        return
    folder = default_folder() if value is None else Path(value)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if value is not None:
            raise click.BadParameter(f"{folder} cannot be made: {error.strerror}.", ctx, param) from error
        warn(f"compiled programs are not kept: {folder} cannot be made: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if is_verbose():
        say(f"compiled programs are kept in {folder}")
