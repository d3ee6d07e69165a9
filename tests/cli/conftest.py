import sys

import pytest

from specsamp_jax.cli import main as main_module


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs `specsamp` with arguments; returns the exit status, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["specsamp", *map(str, arguments)])
        status = 0
        try:
            main_module.main()
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
