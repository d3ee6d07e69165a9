import contextlib

import jax.numpy as jnp
import kernel_cases as cases
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import candidates, scan, sync


def sync_cluster(barrier):
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def arrive(arrivals, sequence, num_blocks):
    number = arrivals.counters[sequence]
    arrivals.counters[sequence] = number + 1
    return number == num_blocks - 1


def lower(ref, index, value):
    ref[index] = jnp.minimum(ref[index], value)


def least_of_cluster(ref, index, value, scratch, barrier, num_blocks):
    # Blocks of a cluster run at the same time, and reading and writing is not one step here: they take turns.
    del scratch
    for turn in range(num_blocks):
        pl.when(lax.axis_index("block") == turn)(lambda: lower(ref, index, value))
        sync_cluster(barrier)
    return ref[index]


def choose_each(scratch, weights, uniforms, layout):
    del scratch, layout
    return [choose(*each) for each in zip(weights, uniforms, strict=True)]


def sum_tiles(scratch, vectors, top, totals, tops, layout):
    del scratch, layout
    sums = jnp.stack([jnp.sum(x) for x in vectors])
    totals[...], tops[...] = sums, jnp.full_like(sums, top)
    return jnp.sum(sums)


def choose(weights, uniform):
    sums, index = jnp.cumsum(weights), jnp.arange(weights.size)
    n, positive = weights.size, weights > 0
    best = jnp.max(jnp.where(positive, jnp.where(sums > uniform * sums[-1], 2 * n - index, index), -1))
    return scan.Choice(jnp.where(best >= n, 2 * n - best, best).astype(jnp.int32), sums[-1])


def collect(vectors, layout, bound, listed, counts, listed_numbers=None, numbers=None):
    x = jnp.concatenate([v.astype(jnp.float32) for v in vectors])
    reached = x >= bound[0]
    place = jnp.where(reached, jnp.cumsum(reached) - 1, listed.shape[0])
    listed[...] = jnp.full(listed.shape, jnp.nan).at[place].set(x, mode="drop")
    if listed_numbers is not None:
        number = jnp.arange(x.size, dtype=jnp.int32) if numbers is None else jnp.concatenate(numbers)
        listed_numbers[...] = jnp.full(listed_numbers.shape, -1, jnp.int32).at[place].set(number, mode="drop")
    counts[candidates.COUNT] = reached.sum(dtype=jnp.int32)


# The interpreter runs no PTX. It runs one launch after the other, and in a grid one block or cluster after the other:
# no launch overlaps another, no counter is raced for, and blocks of a cluster meet at a barrier that it knows.
STAND_INS = {
    "wait_for_previous_launch": lambda: None,
    "cluster_scratch": lambda: plgpu.ClusterBarrier(collective_axes=("block",)),
    "sync_cluster": sync_cluster,
    "arrive": arrive,
    "load_latest": lambda ref, index, scratch: ref[index],
    "lower": lower,
    "least_of_cluster": least_of_cluster,
}


@pytest.fixture(params=["compiled" if cases.ON_GPU else "interpreted with stand-in sync"])
def interpreted(monkeypatch):
    """A context that runs kernels: compiled where there is a GPU, else interpreted with stand-ins for `sync`."""
    if cases.ON_GPU:
        return contextlib.nullcontext
    for name, fn in STAND_INS.items():
        monkeypatch.setattr(sync, name, fn)
    monkeypatch.setattr(candidates, "collect", collect)
    monkeypatch.setattr(scan, "choose_each", choose_each)
    monkeypatch.setattr(scan, "sum_tiles", sum_tiles)
    monkeypatch.setattr(scan, "warp_min", jnp.min)

    def interpreted(**params):
        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore", **params))

    return interpreted
