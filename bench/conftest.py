"""Lets `pytest bench --benchmark-only` find the suites, and says with each result what it was measured on."""

import pytest
import timing


def pytest_collect_file(file_path, parent):
    """Collects `bench_*.py`; a file that was named on the command line is collected by pytest itself."""
    if file_path.match("bench_*.py") and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.fixture(scope="session")
def environment():
    about = timing.environment()
    return {"device": about["device"], "cores": about["cores"], **about["versions"]}
