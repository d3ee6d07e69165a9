"""Synchronisation primitives in PTX: between threads of a block, blocks of a sequence, and launches.

Memory model. Threads of a block order their accesses to shared and global memory at the warpgroup barrier. Blocks of a
cluster order theirs at the cluster barrier (`arrive.release`, `wait.acquire`). Blocks that are no cluster count
themselves with an atomic addition of release and acquire semantics at GPU scope: the last to arrive sees what the
others wrote before they arrived, and none waits. A dependent launch sees what the launch before it wrote once
`griddepcontrol.wait` returns, which is when that launch has ended.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu


class Arrivals(NamedTuple):
    """A counter per sequence, for blocks that are no cluster.

    Attributes:
      counters: Global memory, int32 `[B]`: how many blocks of each sequence have arrived, from 0.
      number: Shared memory, int32 `[1]`: how many had arrived before this block.
    """

    counters: Any
    number: Any


def int32_scratch() -> Any:
    """Scratch for one int32 in shared memory."""
    return plgpu.SMEM((1,), jnp.int32)


def start_dependent_launch():
    """Lets the next launch begin once all blocks have called this; it calls `wait_for_previous_launch`."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.inline_ptx("griddepcontrol.launch_dependents;", has_side_effects=True)

    emit()


def wait_for_previous_launch():
    """Waits until the previous launch has ended; after it, this block sees what that launch wrote."""
    plgpu.griddepcontrol_wait()


def sync_threads():
    """Barrier of the threads of a block: what any of them wrote before it, all of them see after it."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.warpgroup_barrier()

    emit()


def cluster_scratch() -> Any:
    """Scratch of the cluster barrier: none, because the barrier is a part of the hardware."""
    return ()


def sync_cluster(scratch: Any):
    """Barrier of the blocks of a cluster: what any of them wrote before it, all of them see after it."""
    del scratch

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        for ptx in ("barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"):
            mosaic.inline_ptx(ptx, has_side_effects=True, convergent=True)

    emit()


def arrive(arrivals: Arrivals, sequence: Any, num_blocks: int) -> jax.Array:
    """Whether this block is the last of a sequence's blocks to arrive. If it is, it sees what the others wrote."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(context, *refs):
        del context
        mosaic.warpgroup_barrier()
        leader = mosaic.single_thread_predicate(mosaic.ThreadSubset.WARPGROUP)
        add = "@$2 atom.acq_rel.gpu.global.add.u32 n, [$0], 1; @$2 st.shared.u32 [$1], n;"
        addresses = [mosaic.memref_ptr(ref) for ref in refs]
        mosaic.inline_ptx("{ .reg .u32 n; " + add + " }", *addresses, leader, has_side_effects=True)
        mosaic.warpgroup_barrier()

    emit(arrivals.counters.at[pl.ds(sequence, 1)], arrivals.number)
    return arrivals.number[0] == num_blocks - 1
