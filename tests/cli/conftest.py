import pytest

import specsamp
from specsamp_jax.cli import generate, shared


@pytest.fixture(autouse=True)
def _terminal(monkeypatch):
    """Standard output counts as a terminal, so that messages are written; no programs are kept."""
    monkeypatch.setenv("SPECSAMP_CACHE", "off")
    monkeypatch.setattr(shared, "stdout_is_terminal", lambda: True)


@pytest.fixture
def run(capsys):
    """Runs `specsamp` with arguments; returns the exit status, standard output and standard error."""

    def run(*arguments):
        status = specsamp.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def not_compiled(*arguments, **options):
    """Takes the place of `compile_stream` where nothing calls the program."""


@pytest.fixture
def replace_stream(monkeypatch):
    """Lets `specsamp generate` call another function in place of `stream`, for which no program is compiled."""

    def replace_stream(stream, compile_fn=not_compiled):
        monkeypatch.setattr(generate, "stream", stream)
        monkeypatch.setattr(generate, "compile_stream", compile_fn)

    return replace_stream
