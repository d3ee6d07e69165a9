"""The way in which the programs of a test are compiled, which tests/conftest.py sets before each test."""

import contextlib

import jax

from specsamp_jax.decoding import costs
from specsamp_jax.sampling import dispatch, filters

# No test compares times: `measure_goodput` takes its fewest rounds, in place of three seconds.
costs._MOST_ROUNDS = costs._FEWEST_ROUNDS

MAY_COMPILE_KERNELS, CHANGES = dispatch._may_compile_kernels, filters._changes

# Part of the key of all of JAX's caches: a program traced or compiled in one way is never reused in another.
_way = jax.make_user_context((True, True, True))


def way():
    """The arguments of the last call of `compile_with`."""
    return _way.value


def compile_with(optimised, kernels, both):
    """Sets the level of optimisation, and whether kernels and programs without filters are traced.

    Programs of earlier tests stay, for later tests that compile in their way.
    """
    _way.set_global((optimised, kernels, both))
    jax.config.update("jax_disable_most_optimizations", not optimised)
    dispatch._may_compile_kernels = MAY_COMPILE_KERNELS if kernels else _on_a_gpu
    filters._changes = CHANGES if both else _on_if_traced


@contextlib.contextmanager
def without_kernels():
    """For a reference result of a test that traces kernels: a program for a CPU drops them, and is the same."""
    before = way()
    optimised, _, both = before
    compile_with(optimised, False, both)
    try:
        yield
    finally:
        compile_with(*before)


def _on_a_gpu(arguments):
    """Like `dispatch._may_compile_kernels`, for a process that exports nothing for another machine."""
    return dispatch._has_kernels()


def _on_if_traced(sampling, vocab_size):
    """Like `filters._changes`, with filters that are data taken for on: the program with filters is compiled alone."""
    return [flag if isinstance(flag, bool) else True for flag in CHANGES(sampling, vocab_size)]
