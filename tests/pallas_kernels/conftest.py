import contextlib

import kernel_cases as cases
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _waits


def meet_cluster(barrier):
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def arrive(arrivals, sequence, count):
    number = arrivals.counters[sequence]
    arrivals.counters[sequence] = number + 1
    return number == count - 1


@pytest.fixture
def interpreted(monkeypatch):
    """Runs kernels: compiled where there is a GPU, else interpreted on the CPU."""
    if cases.ON_GPU:
        return contextlib.nullcontext
    # The interpreter knows no assembly. It runs one launch after the other, and in a grid one block or cluster after
    # the other: no counter is raced for, and blocks of a cluster meet at a barrier that it knows.
    monkeypatch.setattr(plgpu, "griddepcontrol_wait", lambda: None)
    monkeypatch.setattr(_waits, "cluster_barrier", lambda: [plgpu.ClusterBarrier(collective_axes=("block",))])
    monkeypatch.setattr(_waits, "meet_cluster", meet_cluster)
    monkeypatch.setattr(_waits, "arrive", arrive)

    def interpreted(**params):
        return plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(inline_mgpu="ignore", **params))

    return interpreted
