"""Sums and maxima of short rows are folded in an order that is written, not chosen by the compiler."""

import jax
import numpy as np
import pytest

from specsamp_jax.sampling.reduce import row_max, row_sum


def folded(values):
    """Halves added to each other, element by element, after padding to a power of two."""
    width = 1 << (values.shape[-1] - 1).bit_length()
    values = np.pad(values, ((0, 0), (0, width - values.shape[-1])))
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[:, :half] + values[:, half:]
    return values[:, 0]


@pytest.mark.parametrize("size", [1, 2, 29, 1000, 3001, 8191])
def test_short_rows_are_added_in_the_written_order(size):
    values = np.random.default_rng(size).normal(size=(5, size)).astype(np.float32)
    assert jax.jit(row_sum, static_argnums=1)(values, size).tolist() == folded(values).tolist()
    assert jax.jit(row_max, static_argnums=1)(values, size).tolist() == values.max(-1).tolist()
