"""Collects the suites for `pytest bench --benchmark-only`, and records device and versions with each result."""

import pytest
import timing


def pytest_collect_file(file_path, parent):
    """Collects `bench_*.py`, except a file named on the command line, which pytest collects itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def environment():
    about = timing.environment()
    return {"device": about["device"], "cores": about["cores"], **about["versions"]}
