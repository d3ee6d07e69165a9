import sys
from pathlib import Path

import jax
import pytest

sys.path.append(str(Path(__file__).parents[1] / "models"))


# Of a module: without an __init__.py the scope "package" lasts until the session ends, and other tests count bits.
@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Small models run a moment and compile for seconds: optimising them less takes half of those."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
