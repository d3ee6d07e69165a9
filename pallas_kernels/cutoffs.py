"""Launches that find the cutoffs of rows, one cluster of blocks per row."""

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
from pallas_kernels.cutoff import find
from pallas_kernels.limits import Limits, arrays_of, numbers_of, row_limits
from pallas_kernels.slices import Kept


class Rows(NamedTuple):
    """Logits and their sampling parameters.

    Attributes:
      logits: `[B, R, V]`.
      limits: Numbers, or arrays `[B]`.
    """

    logits: Float[Array, "B R V"]
    limits: Limits


class Beside(NamedTuple):
    """Work of one more cluster per sequence.

    Attributes:
      run: `run(sequence, block, num_blocks, arguments, outputs)`.
      needs: `needs(sequence, i, row, arguments)`, whether a row of the i-th input is searched. None: all are.
    """

    run: Callable[[Any, Any, int, Any, Any], None]
    needs: Callable[[Any, int, Any, Any], jax.Array] | None = None


def cutoffs(*inputs: Rows) -> list[Kept]:
    """Finds what the filters keep of each row of all `inputs`, on a GPU, Hopper or newer.

    Top-k, then top-p, then min-p, ties at the cutoff kept, never above the largest logit. Logits are bfloat16, float16
    or float32, V from `TILE` on and such that `slices.supports(V)`; arithmetic is float32 in an order that depends on V
    and on the number of rows.

    Returns:
      A `Kept` of arrays `[B, R]` for each of `inputs`.
    """
    each = [jax.ShapeDtypeStruct(one.logits.shape[:2], jnp.float32) for one in inputs]
    types = [Kept(one, one, one, None) for one in each]

    def write(i, sequence, row, found, arguments, out):
        del arguments
        for ref, value in zip(out[i], found, strict=True):
            if ref is not None:
                ref[sequence, row] = value

    return launch("cutoffs", inputs, types, write)


def launch(
    name: str,
    inputs: Sequence[Rows],
    out_type: Any,
    write_fn: Callable[[int, Any, Any, Kept, Any, Any], None],
    arguments: Any = (),
    beside: Beside | None = None,
) -> Any:
    """Searches all rows in one launch; `write_fn(i, sequence, row, found, arguments, outputs)` stores a result.

    Args:
      name: Name of the launch in a profile.
      inputs: The rows.
      out_type: Types of the outputs.
      write_fn: Runs in one block for each row, of the i-th input.
      arguments: More arrays, for `write_fn` and `beside`.
      beside: See `Beside`.

    Returns:
      The outputs.
    """
    batch_size, _, vocab_size = inputs[0].logits.shape
    counts = [one.logits.shape[1] for one in inputs]
    num_searched = sum(counts)
    blocks = slices.num_blocks(batch_size * num_searched, vocab_size)
    numbers = [numbers_of(one.limits) for one in inputs]
    dtypes = sorted({jnp.dtype(one.logits.dtype) for one in inputs}, key=str)

    def kernel(inputs, out, between, shared, tiles, barrier):
        sync.start_dependent_launch()
        logits, arrays, arguments = inputs
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def search(i, row):
            kept_tiles = tiles[dtypes.index(logits[i].dtype)]
            flat, index = sequence * counts[i] + row, sequence * num_searched + slot
            part = slices.load_slice(logits[i], vocab_size, flat, index, block, blocks, kept_tiles, barrier)
            found = find(part, row_limits(numbers[i], arrays[i], sequence), between, shared)
            pl.when(block == 0)(lambda: write_fn(i, sequence, row, found, arguments, out))

        first = 0
        for i, count in enumerate(counts):
            row, wanted = slot - first, (slot >= first) & (slot < first + count)
            if beside is not None and beside.needs is not None:
                wanted = wanted & beside.needs(sequence, i, jnp.clip(row, 0, count - 1), arguments)
            pl.when(wanted)(functools.partial(search, i, row))
            first += count
        if beside is not None:
            pl.when(slot == num_searched)(functools.partial(beside.run, sequence, block, blocks, arguments, out))

    kernel.__name__ = name
    arrays = [arrays_of(one.limits, batch_size) for one in inputs]
    tiles = [slices.tiles_scratch(dtype, vocab_size, blocks) for dtype in dtypes]
    out, _ = plgpu.kernel(
        kernel,
        out_type=(out_type, slices.exchange(batch_size * num_searched, blocks)),
        scratch_types=(slices.scratch(), tiles, sync.cluster_scratch()),
        grid=(batch_size, num_searched + (beside is not None)),
        grid_names=("sequence", "row"),
        cluster=(blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(([one.logits.reshape(-1) for one in inputs], arrays, arguments))
    return out
