"""Synchronisation primitives in PTX: between threads of a block, blocks of a sequence, and launches.

Memory model. Threads of a block order their accesses to shared and global memory at the warpgroup barrier. Blocks of a
cluster order theirs at the cluster barrier (`arrive.release`, `wait.acquire`). Blocks outside a
cluster increment a counter with an atomic addition of acquire-release semantics at GPU scope: the last block to arrive
sees all writes that the others made before they arrived, and no block waits. A dependent launch sees the writes of the
previous launch once `griddepcontrol.wait` returns, which is when that launch has ended.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu


class Arrivals(NamedTuple):
    """Arrival counters, one per sequence or per row, for blocks outside a cluster.

    Attributes:
      counters: Global memory, int32: number of blocks of each sequence or row that have arrived, initially 0.
      number: Shared memory, int32 `[1]`: number of blocks that arrived before this block.
    """

    counters: Any
    number: Any


def int32_scratch() -> Any:
    """Scratch for one int32 in shared memory."""
    return plgpu.SMEM((1,), jnp.int32)


def start_dependent_launch():
    """Lets the next launch start once all blocks have called this; that launch calls `wait_for_previous_launch`.

    The first launch of a kernel must not wait: only so does it start after all work before it has ended.
    """

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.inline_ptx("griddepcontrol.launch_dependents;", has_side_effects=True)

    emit()


def wait_for_previous_launch():
    """Waits until the previous launch has ended; afterwards this block sees the writes of that launch."""
    plgpu.griddepcontrol_wait()


def sync_threads():
    """Barrier of the threads of a block: after it, all of them see the writes that any of them made before it."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.warpgroup_barrier()

    emit()


def cluster_scratch() -> Any:
    """Scratch of the cluster barrier: empty, because the barrier is in hardware. The tests put another in its place."""
    return ()


def sync_cluster(scratch: Any):
    """Barrier of the blocks of a cluster: after it, all of them see the writes that any of them made before it."""
    del scratch

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        for ptx in ("barrier.cluster.arrive.release.aligned;", "barrier.cluster.wait.acquire.aligned;"):
            mosaic.inline_ptx(ptx, has_side_effects=True, convergent=True)

    emit()


def prefetch(ref: Any, start: Any, size: Any):
    """Starts the copy of `size` elements of a flat array from `start` on to the L2; both are multiples of 16 bytes."""
    item_bytes = jnp.dtype(ref.dtype).itemsize
    _by_one_thread("cp.async.bulk.prefetch.L2.global [$0], $1;", ref, start, size * item_bytes)


def lower(ref: Any, index: Any, value: Any):
    """Lowers an int32 in global memory to `value`, unless it is lower."""
    _by_one_thread("red.relaxed.gpu.global.min.s32 [$0], $1;", ref, index, value)


def _by_one_thread(instruction: str, ref: Any, index: Any, value: Any):
    """One thread of the block runs an instruction with the address of an element, $0, and a value, $1."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def emit(context, *arguments):
        del context
        ref, value = arguments
        leader = mosaic.single_thread_predicate(mosaic.ThreadSubset.WARPGROUP)
        operands = mosaic.memref_ptr(ref), value.registers.item(), leader
        mosaic.inline_ptx(f"@$2 {instruction}", *operands, has_side_effects=True)

    emit(ref.at[pl.ds(index, 1)], value)


def load_latest(ref: Any, index: Any, scratch: Any) -> jax.Array:
    """Loads an int32 that other blocks may change at this time. One thread does, so that all have the same value.

    `scratch` is from `int32_scratch`. The value may be older than the latest; the order of other loads is not affected.
    """

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def emit(context, *refs):
        del context
        leader = mosaic.single_thread_predicate(mosaic.ThreadSubset.WARPGROUP)
        load = "@$2 ld.relaxed.gpu.global.u32 n, [$0]; @$2 st.shared.u32 [$1], n;"
        addresses = [mosaic.memref_ptr(ref) for ref in refs]
        mosaic.inline_ptx("{ .reg .u32 n; " + load + " }", *addresses, leader, has_side_effects=True)
        mosaic.warpgroup_barrier()

    emit(ref.at[pl.ds(index, 1)], scratch)
    return scratch[0]


def least_of_cluster(ref: Any, index: Any, value: Any, scratch: Any, barrier: Any, num_blocks: int) -> jax.Array:
    """The least `value` of a cluster's blocks, all of which call this with the same index.

    `ref` is global memory, int32, initially the largest int32 at `index`; `scratch` and `barrier` are from
    `int32_scratch` and `cluster_scratch`.
    """
    del num_blocks  # the tests put another function in this place, in which blocks take turns
    pl.when(value < jnp.iinfo(jnp.int32).max)(lambda: lower(ref, index, value))
    sync_cluster(barrier)
    return load_latest(ref, index, scratch)


def arrive(arrivals: Arrivals, sequence: Any, num_blocks: Any) -> jax.Array:
    """Counts this block and returns whether it is the sequence's last to arrive; if so, it sees the others' writes."""

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
