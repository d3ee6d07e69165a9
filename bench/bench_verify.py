"""Benchmark of the verification step on each named shape, with the baseline and one read of all logits beside it.

pytest bench/bench_verify.py --benchmark-only -k qwen-K5
"""

import functools
import itertools

import jax
import pytest
import verification
from cases import CASES

NAMES = ("specsamp", "specsamp_normalizers", "specsamp_sigmoid", "baseline", "read_once")


@functools.lru_cache(maxsize=1)
def sets_of(case_name):
    """Inputs of a case. Only the last case is cached, because the largest inputs take half a gigabyte."""
    return verification.make_sets(CASES[case_name], verification.PLAIN)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case_name", CASES)
def test_verify(benchmark, environment, case_name, name):
    case = CASES[case_name]
    _, make_call = verification.CALLS[name]
    fn, arguments_fn = make_call(sets_of(case_name))
    jax.block_until_ready(fn(*arguments_fn(0)))
    turn = itertools.count()

    benchmark.group = case_name
    benchmark.extra_info.update(environment, **case._asdict())
    benchmark.pedantic(
        lambda *arguments: jax.block_until_ready(fn(*arguments)),
        setup=lambda: (jax.block_until_ready(arguments_fn(next(turn))), {}),
        rounds=30,
        warmup_rounds=2,
    )
    benchmark.extra_info["GB/s"] = case.num_bytes / benchmark.stats.stats.median / 1e9
