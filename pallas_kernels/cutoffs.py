"""Launches of `cutoff` for all rows of several arrays.

Few rows take one launch, grid (sequence, row), one cluster of blocks per row: axis "row" counts the rows of all arrays,
one array after the other. Each block of the cluster holds a share of its row in registers, and block 0 writes the
results of the row.

In a cluster, blocks wait for each other, and while they wait they load nothing. More rows than the GPU holds at once
therefore take two launches:

1. `list_candidates`, grid (sequence, row, block): each block lists the candidates of its share of a row, and no block
   waits for another.
2. A launch of as many clusters as run concurrently. Each block decides rows by itself, from their lists. Rows that
   their lists do not decide are then searched by the whole cluster, one row after the other.

The last launch may do other work per sequence (`Extra`).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import config, emit, slices, sync, tiles
from pallas_kernels.cutoff import decide, find_cutoff, list_candidates, load_largest, may_list, search
from pallas_kernels.limits import Limits, RowLimits, array_limits, maybe_on, row_limits, static_limits
from pallas_kernels.slices import Exchange, Kept, Slice


class Rows(NamedTuple):
    """Logits and their sampling parameters.

    Attributes:
      logits: `[B, R, V]`.
      limits: Sampling parameters, each a number or an array `[B]`.
    """

    logits: Float[Array, "B R V"]
    limits: Limits


class Extra(NamedTuple):
    """Work per sequence in the launch that writes the results, in blocks of its own.

    Attributes:
      run_fn: `run_fn(sequence, block, num_blocks, arguments, outputs)` does the work of one of `num_blocks` blocks.
      needs_row_fn: `needs_row_fn(sequence, i, row, arguments)` returns whether the results of a row of the i-th input
        are needed; other rows are skipped and their outputs are undefined. None: all rows are needed.
    """

    run_fn: Callable[[Any, Any, int, Any, Any], None]
    needs_row_fn: Callable[[Any, int, Any, Any], jax.Array] | None = None


class _Job(NamedTuple):
    """The arguments of `launch`, and sizes: rows of each input per sequence, and rows of all inputs per sequence."""

    name: str
    inputs: Sequence[Rows]
    out_type: Any
    write_fn: Callable[[int, Any, Any, Kept, Any, Any], None]
    extra: Extra | None
    limits_fn: Callable[[Limits, Limits, Any], RowLimits]
    batch_size: int
    vocab_size: int
    num_rows: list[int]
    num_slots: int
    blocks: int

    @property
    def dtypes(self) -> list[Any]:
        return sorted({jnp.dtype(rows.logits.dtype) for rows in self.inputs}, key=str)


def cutoffs(*inputs: Rows) -> list[Kept]:
    """Finds the logits that the filters keep in each row of all `inputs`, on a Hopper or newer GPU.

    Top-k is applied first, then top-p, then min-p. Logits equal to the cutoff are kept, and the cutoff is never above
    the largest logit. Logits are bfloat16, float16 or float32, with V of at least `TILE` and `slices.supports(V)`. Sums
    are float32, in an order that depends on V and on the number of rows.

    Returns:
      A `Kept` of arrays `[B, R]` for each of `inputs`.
    """
    shapes = [jax.ShapeDtypeStruct(rows.logits.shape[:2], jnp.float32) for rows in inputs]
    types = [Kept(shape, shape, shape, None) for shape in shapes]

    def write(i, sequence, row, kept, arguments, out):
        del arguments
        for ref, value in zip(out[i], kept, strict=True):
            if ref is not None:
                ref[sequence, row] = value

    return launch("cutoffs", inputs, types, write, limits_fn=_row_limits_without_greedy)


def _row_limits_without_greedy(static: Limits, arrays: Limits, sequence: Any) -> RowLimits:
    """Like `row_limits`, but no row is greedy: `cutoffs` does not return the first largest logit."""
    return row_limits(static, arrays, sequence)._replace(greedy=None)


def launch(
    name: str,
    inputs: Sequence[Rows],
    out_type: Any,
    write_fn: Callable[[int, Any, Any, Kept, Any, Any], None],
    arguments: Any = (),
    extra: Extra | None = None,
    limits_fn: Callable[[Limits, Limits, Any], RowLimits] = row_limits,
) -> Any:
    """Finds the cutoffs of all rows, in one launch or two.

    Args:
      name: Name of the last launch in a profile.
      inputs: The rows, with equal B and V.
      out_type: Types of the outputs.
      write_fn: `write_fn(i, sequence, row, kept, arguments, outputs)` writes the results of a row of the i-th input. It
        runs in one block per row, or in two blocks one after the other, of which the last has the results.
      arguments: Additional arrays that are passed to `write_fn` and `extra`.
      extra: Other work of the last launch, or None.
      limits_fn: Returns the parameters of a row, like `limits.row_limits`. Where they say that a row may be greedy,
        `write_fn` must use `Kept.first`: Mosaic GPU (JAX 0.11 and 0.12) has no layout for the lane numbers of a value
        that is unused, and searches all layouts of the kernel for one, without end in practice.

    Returns:
      The outputs.
    """
    batch_size, _, vocab_size = inputs[0].logits.shape
    num_rows = [rows.logits.shape[1] for rows in inputs]
    blocks = slices.num_blocks(batch_size * sum(num_rows), vocab_size)
    job = _Job(
        name, inputs, out_type, write_fn, extra, limits_fn, batch_size, vocab_size, num_rows, sum(num_rows), blocks
    )
    arrays = [array_limits(rows.limits, batch_size) for rows in inputs]
    args = [rows.logits.reshape(-1) for rows in inputs], arrays, arguments
    at_once = config.EMITTING_BLOCKS * config.num_multiprocessors()
    lists = all(may_list(maybe_on(rows.limits)) for rows in inputs)
    if lists and batch_size * job.num_slots * blocks >= 2 * at_once:
        return _decide_rows(job, args, _list_rows(job, args), at_once)
    return _find_cutoffs(job, args)


def _find_cutoffs(job: _Job, args: Any) -> Any:
    """One launch, in which each cluster finds the cutoff of one row."""

    def kernel(args, out, exchange, shared, scratch, barrier):
        sync.start_dependent_launch()
        _, _, arguments = args
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def find(i, row):
            part, limits = _slice(job, args, i, sequence, row, block, scratch, barrier)
            kept = find_cutoff(slices.load_slice(part), limits, exchange, shared)
            pl.when(block == 0)(lambda: job.write_fn(i, sequence, row, kept, arguments, out))

        _at_slot(job, sequence, slot, arguments, find)
        if job.extra is not None:
            run = functools.partial(job.extra.run_fn, sequence, block, job.blocks, arguments, out)
            pl.when(slot == job.num_slots)(run)

    kernel.__name__ = job.name
    out, _ = plgpu.kernel(
        kernel,
        out_type=(job.out_type, slices.exchange(job.batch_size * job.num_slots, job.blocks)),
        scratch_types=(slices.scratch(), _tiles_scratch(job), sync.cluster_scratch()),
        grid=(job.batch_size, job.num_slots + (job.extra is not None)),
        grid_names=("sequence", "row"),
        cluster=(job.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(args)
    return out


def _list_rows(job: _Job, args: Any) -> Exchange:
    """Lists the candidates of all rows. Returns an `Exchange` without `sums`."""

    def list_rows(args, exchange, shared):
        sync.start_dependent_launch()
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def list_row(i, row):
            part, limits = _slice(job, args, i, sequence, row, block, None, None)
            list_candidates(slices.load_slice(part), limits, exchange, shared)

        _at_slot(job, sequence, slot, args[2], list_row)

    list_rows.__name__ = "list_candidates"
    exchange = slices.exchange(job.batch_size * job.num_slots, job.blocks)._replace(sums=None)
    return plgpu.kernel(
        list_rows,
        out_type=(exchange,),
        scratch_types=(slices.scratch(),),
        grid=(job.batch_size, job.num_slots, job.blocks),
        grid_names=("sequence", "row", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(args)[0]


def _decide_rows(job: _Job, args: Any, lists: Exchange, at_once: int) -> Any:
    """Finds the cutoffs of all rows from their lists, in as many blocks as run concurrently."""
    num_found = job.batch_size * job.num_slots
    # Work numbers: the rows of all sequences, then one number per sequence for other work.
    num_work = num_found + (0 if job.extra is None else job.batch_size)
    clusters = min(-(-num_work // job.blocks), max(at_once // job.blocks, 1))
    # Each cluster has one lane per work number.
    clusters = max(clusters, -(-num_work // config.THREADS))
    per_cluster = -(-num_work // (clusters * job.blocks)) * job.blocks
    width = config.row_lanes(per_cluster)

    def kernel(args, lists, out, sums, pending, shared, scratch, barrier):
        sync.start_dependent_launch()
        sync.wait_for_previous_launch()
        _, _, arguments = args
        cluster, block = lax.axis_index("cluster"), lax.axis_index("block")
        exchange = lists._replace(sums=sums)

        def row_of(number):
            """Sequence and slot of the cluster's i-th work number. Neighbouring numbers are of different clusters."""
            work = number * clusters + cluster
            return work, work // job.num_slots, work % job.num_slots

        def decide_alone(number):
            work, sequence, slot = row_of(number)
            pending[cluster, number] = 0

            def decide_row(i, row):
                part, limits = _slice(job, args, i, sequence, row, block, None, None)

                def leave_to_cluster(largest):
                    pending[cluster, number] = 1
                    return Kept(largest, jnp.float32(-jnp.inf), jnp.float32(jnp.nan), None)

                kept = decide(part, limits, exchange, shared, leave_to_cluster)
                job.write_fn(i, sequence, row, kept, arguments, out)

            @pl.when(work < num_found)
            def _():
                _at_slot(job, sequence, slot, arguments, decide_row)

            if job.extra is not None:
                extra_fn = job.extra.run_fn

                @pl.when((work >= num_found) & (work < num_work))
                def _():
                    extra_fn(work - num_found, jnp.int32(0), 1, arguments, out)

        def search_together(number):
            _, sequence, slot = row_of(number)

            def search_row(i, row):
                part, limits = _slice(job, args, i, sequence, row, block, scratch, barrier)
                slices.copy_to_shared(part)
                largest, first = load_largest(part, limits, exchange)
                kept = search(part, limits, exchange, largest)._replace(first=first)
                pl.when(block == 0)(lambda: job.write_fn(i, sequence, row, kept, arguments, out))

            _at_slot(job, sequence, slot, arguments, search_row)

        emit.for_each(per_cluster // job.blocks, lambda i: decide_alone(block + i * job.blocks))
        slices.sync_blocks(job.blocks, barrier)
        lane, flags = tiles.lane_index(width), tiles.load_lanes(pending, (cluster,))

        @pl.when(jnp.max(jnp.where(lane < per_cluster, flags, 0)) > 0)
        def _():
            emit.for_each(
                per_cluster, lambda number: pl.when(pending[cluster, number] > 0)(lambda: search_together(number))
            )

    kernel.__name__ = job.name
    sums = slices.exchange(num_found, job.blocks).sums
    out, _, _ = plgpu.kernel(
        kernel,
        out_type=(job.out_type, sums, jax.ShapeDtypeStruct((clusters, width), jnp.int32)),
        scratch_types=(slices.scratch(), _tiles_scratch(job), sync.cluster_scratch()),
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(job.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(args, lists)
    return out


def _at_slot(job: _Job, sequence: Any, slot: Any, arguments: Any, fn: Callable[[int, Any], None]):
    """Calls `fn(i, row)` for the row at a slot, if its results are needed: row `row` of the i-th input."""
    first_slot = 0
    for i, count in enumerate(job.num_rows):
        row, is_needed = slot - first_slot, (slot >= first_slot) & (slot < first_slot + count)
        if job.extra is not None and job.extra.needs_row_fn is not None:
            is_needed = is_needed & job.extra.needs_row_fn(sequence, i, jnp.clip(row, 0, count - 1), arguments)
        pl.when(is_needed)(functools.partial(fn, i, row))
        first_slot += count


def _slice(
    job: _Job, args: Any, i: int, sequence: Any, row: Any, block: Any, scratch: Any, barrier: Any
) -> tuple[Slice, RowLimits]:
    """A block's share of a row of the i-th input, not loaded, and the sampling parameters of the row."""
    logits, arrays, _ = args
    flat, number = sequence * job.num_rows[i] + row, sequence * job.num_slots + sum(job.num_rows[:i]) + row
    shared = None if scratch is None else scratch[job.dtypes.index(jnp.dtype(logits[i].dtype))]
    part = slices.locate_slice(logits[i], job.vocab_size, flat, number, block, job.blocks, shared, barrier)
    return part, job.limits_fn(static_limits(job.inputs[i].limits), arrays[i], sequence)


def _tiles_scratch(job: _Job) -> list[Any]:
    """Scratch for a copy of a block's share of a row, for each dtype of logits."""
    return [slices.tiles_scratch(dtype, job.vocab_size, job.blocks) for dtype in job.dtypes]
