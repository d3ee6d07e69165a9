"""What is waited for: the threads of a block, the blocks of a sequence, a launch by the next one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu


class Arrivals(NamedTuple):
    """Where the blocks of a sequence meet that are no cluster.

    Attributes:
      counters: How many of them have come, `[B]`, from 0.
      number: How many had come before this one, in shared memory.
    """

    counters: Any
    number: Any


def number() -> Any:
    """Room for one."""
    return plgpu.SMEM((1,), jnp.int32)


def start_next():
    """Lets the launch behind this one begin, once all blocks of this one say so: it waits by `wait_for_last`."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.inline_ptx("griddepcontrol.launch_dependents;", has_side_effects=True)

    emit()


def wait_for_last():
    """Waits until the launch before this one has ended, and sees what it wrote."""
    plgpu.griddepcontrol_wait()


def meet_threads():
    """What any thread of the block wrote is seen by all of them."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.warpgroup_barrier()

    emit()


def cluster_barrier() -> list[Any]:
    """What a cluster has to have to meet: the hardware's own barrier, which needs nothing, but is not interpreted."""
    return []


def meet_cluster(barrier: Any):
    """Waits for all blocks of the cluster, and sees what they wrote."""
    del barrier

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        for ptx in ("barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"):
            mosaic.inline_ptx(ptx, has_side_effects=True, convergent=True)

    emit()


def arrive(arrivals: Arrivals, sequence: Any, count: int) -> jax.Array:
    """Whether this block is the last of so many to come. If it is, it sees what the others wrote; none waits."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(context, *refs):
        del context
        mosaic.warpgroup_barrier()
        leader = mosaic.single_thread_predicate(mosaic.ThreadSubset.WARPGROUP)
        add = "@$2 atom.acq_rel.gpu.global.add.u32 n, [$0], 1; @$2 st.shared.u32 [$1], n;"
        at = [mosaic.memref_ptr(ref) for ref in refs]
        mosaic.inline_ptx("{ .reg .u32 n; " + add + " }", *at, leader, has_side_effects=True)
        mosaic.warpgroup_barrier()

    emit(arrivals.counters.at[pl.ds(sequence, 1)], arrivals.number)
    return arrivals.number[0] == count - 1
