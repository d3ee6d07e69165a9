"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def process(code, *arguments, stdout=subprocess.PIPE, closed=""):
    """A finished process that ran `code` with `arguments`; `closed` is a shell's redirection, such as `>&-`.

    Programs are compiled with fewer optimisations.
    """
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', sys.executable, "-c", code, *arguments]
    # Without a buffer nothing is left to be written at the exit, where a second error would show.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment)
