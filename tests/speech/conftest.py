import pytest


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(compiled_quickly):
    """Applies to every test of this folder."""
