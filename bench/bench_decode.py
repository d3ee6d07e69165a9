"""Benchmark of `generate` with the trained pair and with the target alone, on the default device.

pytest bench/bench_decode.py --benchmark-only
"""

import functools
import itertools

import decoding
import jax
import pytest

pair = functools.cache(decoding.load_pair)
prompts = functools.cache(decoding.held_out_prompts)


@pytest.mark.parametrize("name", ["speculative", "target_alone", "n_gram", "heuristic"])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_decode(benchmark, environment, batch_size, name):
    texts = prompts(10, batch_size)
    contender = decoding.generate_contender(name, pair(), texts)
    counts = decoding.check(contender, texts, pair().vocab_size)
    turn = itertools.count()

    benchmark.group = f"batch {batch_size}"
    benchmark.extra_info.update(environment, batch_size=batch_size, **decoding.statistics(counts))
    benchmark.pedantic(
        lambda index: jax.block_until_ready(contender.run_fn([index])),
        setup=lambda: ((next(turn),), {}),
        rounds=len(texts),
    )
    benchmark.extra_info["tokens_per_second"] = batch_size * decoding.MAX_NEW_TOKENS / benchmark.stats.stats.median
