"""What several test files share."""

import os

import jax
import numpy as np
import oracle
import pytest

# An interpreted kernel's block that waits for others holds a thread of XLA's pool, which has one a core: on two cores,
# two blocks and the call itself would wait for ever. XLA reads this once, when it is first used.
os.environ.setdefault("NPROC", "8")

FALSE_ALARM = 1e-4
"""How often a chi-square test fails though the law is right. Keys are fixed, so a test that passes keeps passing."""


@pytest.fixture(scope="session")
def assert_law():
    """A function that holds drawn rows of tokens, -1 behind their end, against a law of `oracle`."""

    def assert_law(tokens, law):
        tokens = np.asarray(tokens)
        # One number a row: many times faster to count than rows.
        _, first, counts = np.unique(
            (tokens + 1) @ 100 ** np.arange(tokens.shape[1]), return_index=True, return_counts=True
        )
        drawn = tokens[first]
        observed = {
            tuple(int(t) for t in row if t >= 0): count for row, count in zip(drawn.tolist(), counts, strict=True)
        }
        assert observed.keys() <= law.keys(), "something was emitted that has probability zero"
        cells = sorted(law)
        p_value = oracle.chi_square(
            np.array([observed.get(cell, 0) for cell in cells]), np.array([law[cell] for cell in cells])
        )
        assert p_value > FALSE_ALARM

    return assert_law


# Of a module: a fixture that lasts longer would reach tests that count bits, which must be optimised.
@pytest.fixture(scope="module")
def compiled_quickly():
    """Optimises compiled programs less: small models run for a moment and compile for seconds."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
