"""Sums and maxima of short rows are folded in an order that is written, not chosen by the compiler."""

import jax
import numpy as np
import pytest

from specsamp_jax.sampling.reduce import SHORTEST_CHUNK, num_chunks, row_max, row_sum


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


@pytest.mark.parametrize(
    ("size", "chunks"), [(8193, 1), (20_000, 2), (32_000, 4), (65_536, 8), (128_256, 16), (151_936, 16)]
)
def test_long_rows_are_added_in_chunks_that_devices_share(size, chunks):
    assert num_chunks(size) == chunks
    assert size // chunks >= SHORTEST_CHUNK
    assert size % chunks == 0
    row = np.random.default_rng(size).normal(size=(1, size)).astype(np.float32)
    for add in (row_sum, lambda row, size: row_sum(jax.numpy.exp(row), size)):
        run = jax.jit(add, static_argnums=1)
        # Each chunk has one sum, alone or beside others, and those are added in halves.
        parts = np.array([run(part, size) for part in row.reshape(chunks, 1, -1)]).reshape(1, chunks)
        assert run(row, size).tolist() == folded(parts).tolist()
