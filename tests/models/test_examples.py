import doctest

import pytest

from specsamp_jax.models import adapters, llama


@pytest.mark.parametrize("module", [adapters, llama])
def test_examples_of_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
