import doctest

import pytest

from specsamp_jax.models import adapters, checkpoints, llama


@pytest.mark.parametrize("module", [adapters, checkpoints, llama])
def test_examples_of_the_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
