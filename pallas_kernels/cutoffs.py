"""Launches of `cutoff` for all rows of several arrays, one cluster of blocks per row.

Grid (sequence, row): axis "row" counts the rows of all arrays, one array after the other. Each block of the cluster
holds a share of its row in registers, and block 0 writes the results of the row. A launch may have one more cluster per
sequence for other work (`ExtraCluster`).
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

from pallas_kernels import emit, slices, sync
from pallas_kernels.cutoff import find_cutoff
from pallas_kernels.limits import Limits, array_limits, row_limits, static_limits
from pallas_kernels.slices import Kept


class Rows(NamedTuple):
    """Logits and their sampling parameters.

    Attributes:
      logits: `[B, R, V]`.
      limits: Sampling parameters, each a number or an array `[B]`.
    """

    logits: Float[Array, "B R V"]
    limits: Limits


class ExtraCluster(NamedTuple):
    """Work of one additional cluster per sequence, in the same launch.

    Attributes:
      run_fn: `run_fn(sequence, block, num_blocks, arguments, outputs)` does the work of one block of this cluster.
      needs_row_fn: `needs_row_fn(sequence, i, row, arguments)` returns whether the results of a row of the i-th input
        are needed; other rows are skipped and their outputs are undefined. None: all rows are needed.
    """

    run_fn: Callable[[Any, Any, int, Any, Any], None]
    needs_row_fn: Callable[[Any, int, Any, Any], jax.Array] | None = None


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

    return launch("cutoffs", inputs, types, write)


def launch(
    name: str,
    inputs: Sequence[Rows],
    out_type: Any,
    write_fn: Callable[[int, Any, Any, Kept, Any, Any], None],
    arguments: Any = (),
    extra_cluster: ExtraCluster | None = None,
) -> Any:
    """Finds the cutoffs of all rows in one launch.

    Args:
      name: Name of the launch in a profile.
      inputs: The rows, with equal B and V.
      out_type: Types of the outputs.
      write_fn: `write_fn(i, sequence, row, kept, arguments, outputs)` writes the results of a row of the i-th input. It
        runs in one block per row.
      arguments: Additional arrays that are passed to `write_fn` and `extra_cluster`.
      extra_cluster: Work of one additional cluster per sequence, or None.

    Returns:
      The outputs.
    """
    batch_size, _, vocab_size = inputs[0].logits.shape
    num_rows = [rows.logits.shape[1] for rows in inputs]
    num_slots = sum(num_rows)
    blocks = slices.num_blocks(batch_size * num_slots, vocab_size)
    static = [static_limits(rows.limits) for rows in inputs]
    dtypes = sorted({jnp.dtype(rows.logits.dtype) for rows in inputs}, key=str)

    def kernel(inputs, out, exchange, shared, tiles, barrier):
        sync.start_dependent_launch()
        logits, arrays, arguments = inputs
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def search(i, row):
            row_tiles = tiles[dtypes.index(logits[i].dtype)]
            flat_row, exchange_row = sequence * num_rows[i] + row, sequence * num_slots + slot
            part = slices.load_slice(logits[i], vocab_size, flat_row, exchange_row, block, blocks, row_tiles, barrier)
            kept = find_cutoff(part, row_limits(static[i], arrays[i], sequence), exchange, shared)
            pl.when(block == 0)(lambda: write_fn(i, sequence, row, kept, arguments, out))

        # `slot` counts the rows of all inputs; rows of the i-th input begin at `first_slot`.
        first_slot = 0
        for i, count in enumerate(num_rows):
            row, is_needed = slot - first_slot, (slot >= first_slot) & (slot < first_slot + count)
            if extra_cluster is not None and extra_cluster.needs_row_fn is not None:
                is_needed = is_needed & extra_cluster.needs_row_fn(sequence, i, jnp.clip(row, 0, count - 1), arguments)
            pl.when(is_needed)(functools.partial(search, i, row))
            first_slot += count
        if extra_cluster is not None:
            pl.when(slot == num_slots)(functools.partial(extra_cluster.run_fn, sequence, block, blocks, arguments, out))

    kernel.__name__ = name
    arrays = [array_limits(rows.limits, batch_size) for rows in inputs]
    tiles = [slices.tiles_scratch(dtype, vocab_size, blocks) for dtype in dtypes]
    out, _ = plgpu.kernel(
        kernel,
        out_type=(out_type, slices.exchange(batch_size * num_slots, blocks)),
        scratch_types=(slices.scratch(), tiles, sync.cluster_scratch()),
        grid=(batch_size, num_slots + (extra_cluster is not None)),
        grid_names=("sequence", "row"),
        cluster=(blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(([rows.logits.reshape(-1) for rows in inputs], arrays, arguments))
    return out
