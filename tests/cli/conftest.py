import pytest

import specsamp


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(compiled_quickly):
    """Applies to every test of this folder."""


@pytest.fixture
def run(capsys):
    """Runs `specsamp` with arguments; returns the exit status, standard output and standard error."""

    def run(*arguments):
        status = specsamp.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
