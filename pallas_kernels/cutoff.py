"""Top-k, top-p and min-p of rows of logits as one cutoff per row, found on chip.

A cluster of blocks holds a row in its registers; memory is read once. Every block leaves the largest of its logits and,
where top-k asks for few, those of its logits that may be kept: the k-th largest of the largest logits of 128 groups is
reached by k logits at least, so no logit below it is among the k largest of the row. After the cluster has met, each
block reads all lists and finds the cutoff among a few dozen candidates, by comparing each with all.

Where a list is too long, or there is no such bound (a large k, top-p alone), the cluster searches the row instead
(`search`). What a block writes for the others is in global memory; the cluster's barrier orders it.
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

from pallas_kernels import candidates, config, emit, scan, slices, sync
from pallas_kernels import tiles as tiling
from pallas_kernels.limits import Limits, RowLimits, arrays_of, min_p_cutoff, numbers_of, row_limits
from pallas_kernels.rows import LOWEST, MAX_INDEX, exp2_rate
from pallas_kernels.search import round_down
from pallas_kernels.search import search as search_row
from pallas_kernels.slices import LISTED, Exchange, Kept, Scratch, Slice
from pallas_kernels.types import TILE

MAX_TOP_K = 128
"""The largest k for which there are groups enough."""


def find(part: Slice, limits: RowLimits, between: Exchange, shared: Scratch) -> Kept:
    """Applies all filters to one row; every block of the cluster computes an equal `Kept`."""
    rate = exp2_rate(limits.scale)
    largest = functools.reduce(jnp.maximum, part.tiles)
    top = jnp.max(largest.astype(jnp.float32))
    # Where top-p alone is on, what is kept depends on the mass of all.
    may_list = limits.top_k is not None or (limits.top_p is None and limits.min_p is not None)
    bound = top_k_bound = jnp.float32(LOWEST)
    listing = jnp.bool_(may_list)
    if limits.top_k is not None:
        active = (limits.top_k > 0) & (limits.top_k < part.vocab_size)
        listing = jnp.bool_(active) & (limits.top_k <= MAX_TOP_K)
        scan.store_sums(shared.groups, largest.astype(jnp.float32))
        count = jnp.where(listing, limits.top_k, 1)
        top_k_bound = jnp.where(listing, jnp.maximum(_bound_of_groups(shared, TILE, count), bound), bound)
        bound = top_k_bound
    if limits.min_p is not None:
        bound = jnp.maximum(bound, round_down(min_p_cutoff(top, limits), part.dtype))
    between.tops[part.row, part.block] = top
    if limits.greedy is not None:
        # The first of the largest logits of this block: few rows are greedy, and their loads are over.
        between.firsts[part.row, part.block] = lax.cond(
            limits.greedy, lambda: _first_largest(part, top), lambda: jnp.int32(MAX_INDEX)
        )
    between.bounds[part.row, part.block] = top_k_bound
    if may_list:
        shared.bound[0] = bound
        # A bound of the lowest number would list everything.
        listing = listing & (bound > LOWEST)

        @pl.when(listing)
        def _():
            candidates.collect(part.tiles, part.layout, shared.bound, shared.listed, shared.counts)
            values = plgpu.load(shared.listed, layout=tiling.lane_layout(LISTED))
            # Registers -> L2: [LISTED].
            scan.store_sums(between.lists.at[part.row, part.block], values)

        between.counts[part.row, part.block] = jnp.where(listing, shared.counts[candidates.COUNT], LISTED + 1)
    slices.meet(part)
    tops = slices.of_blocks(between.tops.at[part.row], part, -jnp.inf)
    largest = jnp.max(tops)
    first = None
    if limits.greedy is not None:
        firsts = slices.of_blocks(between.firsts.at[part.row], part, MAX_INDEX)
        first = jnp.min(jnp.where(tops == largest, firsts, MAX_INDEX))
    nothing = Kept(largest, jnp.float32(-jnp.inf), jnp.float32(jnp.nan), None)

    def search():
        first = jnp.max(slices.of_blocks(between.bounds.at[part.row], part, LOWEST))
        return search_row(part, limits, between, largest, first)

    def find_kept():
        if not may_list:
            return search()
        counts = slices.of_blocks(between.counts.at[part.row], part, 0)
        fits = jnp.max(counts) <= LISTED
        pl.when(fits)(lambda: _collect_again(part, limits, between, shared, largest))
        fits = fits & (jnp.where(fits, shared.counts[candidates.COUNT], LISTED + 1) <= LISTED)
        return lax.cond(fits, lambda: _among_candidates(limits, shared, largest, rate, part.vocab_size), search)

    return lax.cond(jnp.abs(largest) < jnp.inf, find_kept, lambda: nothing)._replace(first=first)


def _first_largest(part: Slice, top: Any) -> jax.Array:
    """Index of the first logit of a block's share that equals its largest."""
    first = plgpu.layout_cast(jnp.full((TILE,), MAX_INDEX), part.layout)
    for i, x in enumerate(part.tiles):
        number = i * part.num_blocks + part.block
        tile = tiling.locate_tile(number, part.vocab_size, [(part.logits, part.flat)], False)
        first = jnp.where(x.astype(jnp.float32) == top, jnp.minimum(first, tile.indices()), first)
    return jnp.min(first)


def _bound_of_groups(shared: Scratch, size: int, count: Any) -> jax.Array:
    """Bound that at least `count` of the `[size]` numbers in `shared.groups` reach; -inf if none is found."""
    width = config.THREADS
    parts = [
        plgpu.load(shared.groups.at[pl.ds(i, width)], layout=tiling.lane_layout(width)) for i in range(0, size, width)
    ]
    shared.of_groups[...] = functools.reduce(jnp.maximum, parts)
    return candidates.kth_largest(shared.of_groups, count)


def _collect_again(part: Slice, limits: RowLimits, between: Exchange, shared: Scratch, largest: Any):
    """Lists the candidates of all blocks that may be kept, now that all are known."""
    layout = tiling.lane_layout(LISTED)
    lane = plgpu.broadcasted_iota(jnp.int32, (LISTED,), 0, layout=layout)
    counts = [between.counts[part.row, i] for i in range(part.num_blocks)]
    # L2 -> registers: [LISTED] of each block.
    lists = [plgpu.load(between.lists.at[part.row, i], layout=layout, optimized=False) for i in range(part.num_blocks)]
    lists = [jnp.where(lane < count, x, -jnp.inf) for count, x in zip(counts, lists, strict=True)]
    bound = jnp.float32(LOWEST)
    if limits.top_k is not None:
        shared.of_groups[...] = functools.reduce(jnp.maximum, lists)
        bound = jnp.maximum(bound, candidates.kth_largest(shared.of_groups, limits.top_k))
    if limits.min_p is not None:
        bound = jnp.maximum(bound, min_p_cutoff(largest, limits))
    shared.bound[0] = bound
    candidates.collect(lists, layout, shared.bound, shared.listed, shared.counts)


def _among_candidates(limits: RowLimits, shared: Scratch, largest: Any, rate: Any, vocab_size: int) -> Kept:
    """The cutoff and the sum, each candidate compared with all."""
    layout = tiling.lane_layout(LISTED)
    count = shared.counts[candidates.COUNT]
    lane = plgpu.broadcasted_iota(jnp.int32, (LISTED,), 0, layout=layout)
    x = jnp.where(lane < count, plgpu.load(shared.listed, layout=layout), -jnp.inf)
    weight = jnp.exp2((x - largest) * rate)
    shared.weights[...] = weight

    def compare(i, carry):
        reached, mass = carry
        above = shared.listed[i] >= x
        return reached + above.astype(jnp.int32), mass + jnp.where(above, shared.weights[i], 0.0)

    zeros = [plgpu.layout_cast(jnp.zeros((LISTED,), dtype), layout) for dtype in (jnp.int32, jnp.float32)]
    reached, mass = lax.fori_loop(0, count, compare, tuple(zeros))
    cutoff = jnp.float32(-jnp.inf)
    if limits.top_k is not None:
        active = (limits.top_k > 0) & (limits.top_k < vocab_size)
        kept = jnp.max(jnp.where(reached >= limits.top_k, x, -jnp.inf))
        cutoff = jnp.where(active, kept, cutoff)
    if limits.top_p is not None:
        wanted = limits.top_p * jnp.sum(jnp.where(x >= cutoff, weight, 0.0))
        found = jnp.max(jnp.where(mass >= wanted, x, -jnp.inf))
        cutoff = jnp.where(limits.top_p < 1, jnp.maximum(cutoff, found), cutoff)
    if limits.min_p is not None:
        cutoff = jnp.maximum(cutoff, min_p_cutoff(largest, limits))
    cutoff = jnp.minimum(cutoff, largest)
    return Kept(largest, cutoff, jnp.sum(jnp.where(x >= cutoff, weight, 0.0)), None)


class Rows(NamedTuple):
    """Logits and their sampling parameters.

    Attributes:
      logits: `[B, R, V]`.
      limits: Numbers, or arrays `[B]`.
    """

    logits: Float[Array, "B R V"]
    limits: Limits


class Beside(NamedTuple):
    """What one more cluster per sequence does in the launch.

    Attributes:
      run: `run(sequence, block, num_blocks, arguments, outputs)`.
      needs: `needs(sequence, i, row, arguments)`, whether a row of the i-th input is searched. None: all are.
    """

    run: Callable[[Any, Any, int, Any, Any], None]
    needs: Callable[[Any, int, Any, Any], jax.Array] | None = None


def cutoffs(*inputs: Rows) -> list[Kept]:
    """Finds what the filters keep of each row, in one launch for all `inputs`, on a GPU, Hopper or newer.

    Top-k, then top-p, then min-p, ties at the cutoff kept, never above the largest logit. Logits are bfloat16, float16
    or float32, V from `TILE` on and such that `supports(V)`; arithmetic is float32 in an order that depends on V and on
    the number of rows.

    Returns:
      A `Kept` of arrays `[B, R]` for each of `inputs`.
    """
    types = [Kept(*(jax.ShapeDtypeStruct(one.logits.shape[:2], jnp.float32),) * 3, None) for one in inputs]

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
    num_rows = [one.logits.shape[1] for one in inputs]
    num_searched = sum(num_rows)
    blocks = slices.num_blocks(batch_size * num_searched, vocab_size)
    numbers = [numbers_of(one.limits) for one in inputs]
    arrays = [arrays_of(one.limits, batch_size) for one in inputs]
    dtypes = sorted({jnp.dtype(one.logits.dtype) for one in inputs}, key=str)
    tiles = [slices.tiles_scratch(dtype, vocab_size, blocks) for dtype in dtypes]

    def kernel(inputs, out, between, shared, tiles, barrier):
        sync.start_dependent_launch()
        logits, arrays, arguments = inputs
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def search(i, row):
            kept_tiles, count = tiles[dtypes.index(logits[i].dtype)], num_rows[i]
            flat, index = sequence * count + row, sequence * num_searched + slot
            part = slices.load_slice(logits[i], vocab_size, flat, index, block, blocks, kept_tiles, barrier)
            found = find(part, row_limits(numbers[i], arrays[i], sequence), between, shared)
            pl.when(block == 0)(lambda: write_fn(i, sequence, row, found, arguments, out))

        first = 0
        for i, count in enumerate(num_rows):
            row, wanted = slot - first, (slot >= first) & (slot < first + count)
            if beside is not None and beside.needs is not None:
                wanted = wanted & beside.needs(sequence, i, jnp.clip(row, 0, count - 1), arguments)
            pl.when(wanted)(functools.partial(search, i, row))
            first += count
        if beside is not None:
            pl.when(slot == num_searched)(lambda: beside.run(sequence, block, blocks, arguments, out))

    kernel.__name__ = name
    given = [one.logits.reshape(-1) for one in inputs], arrays, arguments
    out, _ = plgpu.kernel(
        kernel,
        out_type=(out_type, slices.exchange(batch_size * num_searched, blocks)),
        scratch_types=(slices.scratch(), tiles, sync.cluster_scratch()),
        grid=(batch_size, num_searched + (beside is not None)),
        grid_names=("sequence", "row"),
        cluster=(blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(given)
    return out
