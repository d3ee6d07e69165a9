"""Cached readers of the files in tests/fixtures, and a comparison with a tolerance relative to the largest value."""

import functools
import json
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parent / "fixtures"


@functools.cache
def arrays(path):
    """Arrays of an npz file, by name."""
    with np.load(FIXTURES / path) as file:
        return dict(file)


@functools.cache
def values(path):
    """Contents of a JSON file."""
    return json.loads((FIXTURES / path).read_text())


def assert_near(value, expected, rtol=1e-4):
    """Asserts that `value` differs from `expected` by at most `rtol` times the largest expected value."""
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(value, expected, rtol=0, atol=rtol * np.abs(expected).max())
