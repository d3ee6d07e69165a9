"""Top-k, top-p and min-p of rows of logits as one cutoff per row, found on chip.

A cluster of blocks holds a row in its registers; memory is read once. Every block leaves the largest of its logits and,
where top-k asks for few, those of its logits that may be kept: the k-th largest of the largest logits of 128 groups is
reached by k logits at least, so no logit below it is among the k largest of the row. After the cluster has met, each
block reads all lists and finds the cutoff among a few dozen candidates, by comparing each with all.

Where a list is too long, or there is no such bound (a large k, top-p alone), the cluster searches the row instead
(`search`). What a block writes for the others is in global memory; the cluster's barrier orders it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import candidates, config, scan, slices
from pallas_kernels import tiles as tiling
from pallas_kernels.limits import RowLimits, min_p_cutoff
from pallas_kernels.rows import LOWEST, MAX_INDEX, exp2_rate
from pallas_kernels.search import round_down
from pallas_kernels.search import search as search_row
from pallas_kernels.slices import LISTED, Exchange, Kept, Scratch, Slice
from pallas_kernels.types import TILE

MAX_TOP_K = 128
"""The largest k for which there are groups enough."""


def find(part: Slice, limits: RowLimits, between: Exchange, shared: Scratch) -> Kept:
    """Applies all filters to one row; every block of the cluster computes an equal `Kept`."""
    _list_candidates(part, limits, between, shared)
    slices.meet(part)
    return _decide(part, limits, between, shared)


def _may_list(limits: RowLimits) -> bool:
    """Whether candidates may be listed: where top-p alone is on, what is kept depends on the mass of all."""
    return limits.top_k is not None or (limits.top_p is None and limits.min_p is not None)


def _list_candidates(part: Slice, limits: RowLimits, between: Exchange, shared: Scratch):
    """Leaves what the cluster must know of this block's share, its candidates among it."""
    largest = functools.reduce(jnp.maximum, part.tiles)
    top = jnp.max(largest.astype(jnp.float32))
    bound = top_k_bound = jnp.float32(LOWEST)
    lists = jnp.bool_(_may_list(limits))
    if limits.top_k is not None:
        active = (limits.top_k > 0) & (limits.top_k < part.vocab_size)
        lists = jnp.bool_(active) & (limits.top_k <= MAX_TOP_K)
        scan.store_sums(shared.groups, largest.astype(jnp.float32))
        count = jnp.where(lists, limits.top_k, 1)
        top_k_bound = jnp.where(lists, jnp.maximum(_bound_of_groups(shared, TILE, count), bound), bound)
        bound = top_k_bound
    if limits.min_p is not None:
        bound = jnp.maximum(bound, round_down(min_p_cutoff(top, limits), part.dtype))
    between.tops[part.row, part.block] = top
    if limits.greedy is not None:
        # Few rows are greedy.
        between.firsts[part.row, part.block] = lax.cond(
            limits.greedy, lambda: _first_largest(part, top), lambda: jnp.int32(MAX_INDEX)
        )
    between.bounds[part.row, part.block] = top_k_bound
    if _may_list(limits):
        shared.bound[0] = bound
        # A bound of the lowest number would list everything.
        lists = lists & (bound > LOWEST)

        @pl.when(lists)
        def _():
            candidates.collect(part.tiles, part.layout, shared.bound, shared.listed, shared.counts)
            values = plgpu.load(shared.listed, layout=tiling.lane_layout(LISTED))
            # Registers -> L2: [LISTED].
            scan.store_sums(between.lists.at[part.row, part.block], values)

        between.counts[part.row, part.block] = jnp.where(lists, shared.counts[candidates.COUNT], LISTED + 1)


def _decide(part: Slice, limits: RowLimits, between: Exchange, shared: Scratch) -> Kept:
    """The cutoff and the sum, from what all blocks left, or by a search of the row."""
    rate = exp2_rate(limits.scale)
    tops = slices.of_blocks(between.tops.at[part.row], part, -jnp.inf)
    largest = jnp.max(tops)
    first = None
    if limits.greedy is not None:
        firsts = slices.of_blocks(between.firsts.at[part.row], part, MAX_INDEX)
        first = jnp.min(jnp.where(tops == largest, firsts, MAX_INDEX))
    nothing = Kept(largest, jnp.float32(-jnp.inf), jnp.float32(jnp.nan), None)

    def search():
        least = jnp.max(slices.of_blocks(between.bounds.at[part.row], part, LOWEST))
        return search_row(part, limits, between.sums, largest, least)

    def find_kept():
        if not _may_list(limits):
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
