"""Programs of tests that compile in different ways: none takes the place of another, and none is compiled twice."""

import jax
import programs
import pytest


@pytest.fixture
def restored():
    before = programs.way()
    yield
    programs.compile_with(*before)


def test_a_program_is_traced_once_for_each_way_of_compiling(restored):
    num_traces = 0

    @jax.jit
    def fn(x):
        nonlocal num_traces
        num_traces += 1
        return x + 1

    ways = [(optimised, kernels, False) for optimised in (True, False) for kernels in (True, False)]
    for way in [*ways, *ways]:
        programs.compile_with(*way)
        assert programs.way() == way
        assert fn(1.0) == 2
    assert num_traces == len(ways)
