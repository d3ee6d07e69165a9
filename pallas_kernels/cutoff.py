"""Finds the smallest logit of a row that top-k, top-p and min-p keep: one cutoff for all three filters.

A cluster of blocks holds the row in its registers, so the row is read from memory once (`slices`).

1. Each block writes its largest logit and a list of candidates to global memory (`Exchange`). A candidate is a logit
   that is at least a lower bound of the cutoff. For top-k, the block divides its logits into 128 groups; the bound is
   the k-th largest of the 128 group maxima. At least k logits are as large as this bound, so the k-th largest logit of
   the row is too. Min-p has a bound of its own.
2. After the cluster barrier, each block reads the lists of all blocks, merges them into one list of a few dozen
   candidates, and finds the cutoff by comparing each candidate with all others.

If a list is too long, or if there is no bound (k > 128, or top-p alone), the cluster searches the whole row instead
(`search`). For many rows, the two steps are launches of their own (`cutoffs`).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import candidates, config, slices
from pallas_kernels import tiles as tiling
from pallas_kernels.limits import Limits, RowLimits, min_p_cutoff
from pallas_kernels.rows import LOWEST, MAX_INDEX, exp2_rate
from pallas_kernels.search import round_down, search_row
from pallas_kernels.slices import MAX_CANDIDATES, Exchange, Kept, Scratch, Slice
from pallas_kernels.types import TILE

TILE_BITS = TILE.bit_length() - 1
"""Binary logarithm of `TILE`."""

MAX_TOP_K = 128
"""Largest k for which candidates are listed: the number of groups of logits."""


def find_cutoff(part: Slice, limits: RowLimits, exchange: Exchange, shared: Scratch) -> Kept:
    """Applies all filters to one row. All blocks of the cluster call this and return equal values."""
    list_candidates(part, limits, exchange, shared)
    slices.sync_blocks(part.num_blocks, part.barrier)
    return decide(part, limits, exchange, shared, lambda largest: search(part, limits, exchange, largest))


def may_list(limits: RowLimits | Limits) -> bool:
    """Whether candidates may be listed. Not for top-p alone, whose cutoff depends on the sum over the whole row."""
    return limits.top_k is not None or (limits.top_p is None and limits.min_p is not None)


def list_candidates(part: Slice, limits: RowLimits, exchange: Exchange, shared: Scratch):
    """Writes the largest logit of this block's share and its candidates to `exchange`."""
    largest = functools.reduce(jnp.maximum, part.tiles)
    top = jnp.max(largest.astype(jnp.float32))
    bound = top_k_bound = jnp.float32(LOWEST)
    is_listed = jnp.bool_(may_list(limits))
    if limits.top_k is not None:
        active = (limits.top_k > 0) & (limits.top_k < part.vocab_size)
        is_listed = jnp.bool_(active) & (limits.top_k <= MAX_TOP_K)
        tiling.store(shared.position_max, largest.astype(jnp.float32))
        count = jnp.where(is_listed, limits.top_k, 1)
        top_k_bound = jnp.where(is_listed, jnp.maximum(_group_bound(shared, TILE, count), bound), bound)
        bound = top_k_bound
    if limits.min_p is not None:
        bound = jnp.maximum(bound, round_down(min_p_cutoff(top, limits), part.dtype))
    exchange.tops[part.row, part.block] = top
    if limits.greedy is not None:
        # In a branch, because few rows are greedy.
        exchange.firsts[part.row, part.block] = lax.cond(
            limits.greedy, lambda: _first_largest(part, top), lambda: jnp.int32(MAX_INDEX)
        )
    exchange.bounds[part.row, part.block] = top_k_bound
    if may_list(limits):
        shared.bound[0] = bound
        # With the lowest number as bound, every logit would be a candidate.
        is_listed = is_listed & (bound > LOWEST)

        @pl.when(is_listed)
        def _():
            numbered = None if exchange.tokens is None else shared.numbers
            candidates.collect(part.tiles, part.layout, shared.bound, shared.listed, shared.counts, numbered)
            if exchange.tokens is not None:
                numbers = plgpu.load(shared.numbers, layout=tiling.lane_layout(MAX_CANDIDATES))
                # Registers -> L2: [MAX_CANDIDATES].
                tiling.store(exchange.tokens.at[part.row, part.block], _tokens(part, numbers))
            values = plgpu.load(shared.listed, layout=tiling.lane_layout(MAX_CANDIDATES))
            # Registers -> L2: [MAX_CANDIDATES].
            tiling.store(exchange.lists.at[part.row, part.block], values)

        exchange.counts[part.row, part.block] = jnp.where(
            is_listed, shared.counts[candidates.COUNT], MAX_CANDIDATES + 1
        )


def decide(
    part: Slice, limits: RowLimits, exchange: Exchange, shared: Scratch, search_fn: Callable[[jax.Array], Kept]
) -> Kept:
    """Finds the cutoff and the sum of the kept weights from the candidates of all blocks.

    If the candidates do not decide, returns `search_fn(largest)`, with the largest logit of the row. Uses only the
    index and the sizes in `part`, not its tiles.
    """
    rate = exp2_rate(limits.scale)
    largest, first = load_largest(part, limits, exchange)
    degenerate = Kept(largest, jnp.float32(-jnp.inf), jnp.float32(jnp.nan), None)

    def find_kept():
        if not may_list(limits):
            return search_fn(largest)
        return lax.cond(
            merge(part, limits, exchange, shared, largest),
            lambda: cutoff_among_candidates(limits, shared, largest, rate, part.vocab_size),
            lambda: search_fn(largest),
        )

    return lax.cond(jnp.abs(largest) < jnp.inf, find_kept, lambda: degenerate)._replace(first=first)


def merge(part: Slice, limits: RowLimits, exchange: Exchange, shared: Scratch, largest: jax.Array) -> jax.Array:
    """Merges the lists of all blocks, and returns whether the merged list, `shared.listed`, has all candidates."""
    counts = slices.load_per_block(exchange.counts, (part.row,), part, 0)
    # A larger count means that the list of a block is incomplete or was not made.
    fits = jnp.max(counts) <= MAX_CANDIDATES
    pl.when(fits)(lambda: _merge_candidates(part, limits, exchange, shared, largest))
    return fits & (jnp.where(fits, shared.counts[candidates.COUNT], MAX_CANDIDATES + 1) <= MAX_CANDIDATES)


def load_largest(part: Slice, limits: RowLimits, exchange: Exchange) -> tuple[jax.Array, jax.Array | None]:
    """The largest logit of the row, and its first index if the row can be greedy, from the results of all blocks."""
    tops = slices.load_per_block(exchange.tops, (part.row,), part, -jnp.inf)
    largest = jnp.max(tops)
    if limits.greedy is None:
        return largest, None
    firsts = slices.load_per_block(exchange.firsts, (part.row,), part, MAX_INDEX)
    return largest, jnp.min(jnp.where(tops == largest, firsts, MAX_INDEX))


def search(part: Slice, limits: RowLimits, exchange: Exchange, largest: jax.Array) -> Kept:
    """Finds the cutoff and the sum of the kept weights by a search of the row. All blocks of the cluster call this."""
    top_k_bound = jnp.max(slices.load_per_block(exchange.bounds, (part.row,), part, LOWEST))
    return search_row(part, limits, exchange.sums, largest, top_k_bound)


def _first_largest(part: Slice, top: Any) -> jax.Array:
    """Index in the row of the first logit of a block's share that equals `top`, its largest."""
    first = plgpu.layout_cast(jnp.full((TILE,), MAX_INDEX), part.layout)
    for i, x in enumerate(part.tiles):
        number = i * part.num_blocks + part.block
        tile = tiling.locate_tile(number, part.vocab_size, [(part.logits, part.flat)])
        first = jnp.where(x.astype(jnp.float32) == top, jnp.minimum(first, tile.indices()), first)
    return jnp.min(first)


def _group_bound(shared: Scratch, size: int, count: Any) -> jax.Array:
    """The `count`-th largest of the maxima of 128 groups of logits, from `[size]` values in `shared.position_max`.

    Group i holds the logits at positions i, i + 128, i + 256, ... of the tiles.
    """
    width = config.THREADS
    parts = [
        plgpu.load(shared.position_max.at[pl.ds(i, width)], layout=tiling.lane_layout(width))
        for i in range(0, size, width)
    ]
    shared.group_max[...] = functools.reduce(jnp.maximum, parts)
    return candidates.kth_largest(shared.group_max, count)


def _merge_candidates(part: Slice, limits: RowLimits, exchange: Exchange, shared: Scratch, largest: Any):
    """Merges the candidates of all blocks into `shared.listed`, with a higher bound that is computed from all lists."""
    layout = tiling.lane_layout(MAX_CANDIDATES)
    lane = tiling.lane_index(MAX_CANDIDATES)
    counts = [exchange.counts[part.row, i] for i in range(part.num_blocks)]
    # L2 -> registers: [MAX_CANDIDATES] of each block.
    lists = [plgpu.load(exchange.lists.at[part.row, i], layout=layout, optimized=False) for i in range(part.num_blocks)]
    lists = [jnp.where(lane < count, x, -jnp.inf) for count, x in zip(counts, lists, strict=True)]
    bound = jnp.float32(LOWEST)
    tokens, numbered = None, None
    if exchange.tokens is not None:
        numbered = shared.numbers
        tokens = [
            plgpu.load(exchange.tokens.at[part.row, i], layout=layout, optimized=False) for i in range(part.num_blocks)
        ]
    if limits.top_k is not None:
        shared.group_max[...] = functools.reduce(jnp.maximum, lists)
        bound = jnp.maximum(bound, candidates.kth_largest(shared.group_max, limits.top_k))
    if limits.min_p is not None:
        bound = jnp.maximum(bound, min_p_cutoff(largest, limits))
    shared.bound[0] = bound
    candidates.collect(lists, layout, shared.bound, shared.listed, shared.counts, numbered, tokens)


def _tokens(part: Slice, numbers: jax.Array) -> jax.Array:
    """Indices in the row of elements of a block's share, from their indices in the concatenation of its tiles."""
    tile_numbers = (numbers >> TILE_BITS) * part.num_blocks + part.block
    tile = tiling.locate_tile(tile_numbers, part.vocab_size, [(part.logits, part.flat)])
    return tile.first * tile.vec + (numbers & (TILE - 1))


def cutoff_among_candidates(limits: RowLimits, shared: Scratch, largest: Any, rate: Any, vocab_size: int) -> Kept:
    """Finds the cutoff and the sum of the kept weights by comparing each candidate with all others."""
    layout = tiling.lane_layout(MAX_CANDIDATES)
    count = shared.counts[candidates.COUNT]
    lane = tiling.lane_index(MAX_CANDIDATES)
    x = jnp.where(lane < count, plgpu.load(shared.listed, layout=layout), -jnp.inf)
    weight = jnp.exp2((x - largest) * rate)
    shared.weights[...] = weight

    # For each candidate: the number of candidates that are at least as large, and the sum of their weights.
    def compare(i, carry):
        rank, mass = carry
        reaches = shared.listed[i] >= x
        return rank + reaches.astype(jnp.int32), mass + jnp.where(reaches, shared.weights[i], 0.0)

    zeros = [plgpu.layout_cast(jnp.zeros((MAX_CANDIDATES,), dtype), layout) for dtype in (jnp.int32, jnp.float32)]
    rank, mass = lax.fori_loop(0, count, compare, tuple(zeros))
    cutoff = jnp.float32(-jnp.inf)
    if limits.top_k is not None:
        active = (limits.top_k > 0) & (limits.top_k < vocab_size)
        kth_largest = jnp.max(jnp.where(rank >= limits.top_k, x, -jnp.inf))
        cutoff = jnp.where(active, kth_largest, cutoff)
    if limits.top_p is not None:
        required = limits.top_p * jnp.sum(jnp.where(x >= cutoff, weight, 0.0))
        top_p_cutoff = jnp.max(jnp.where(mass >= required, x, -jnp.inf))
        cutoff = jnp.where(limits.top_p < 1, jnp.maximum(cutoff, top_p_cutoff), cutoff)
    if limits.min_p is not None:
        cutoff = jnp.maximum(cutoff, min_p_cutoff(largest, limits))
    cutoff = jnp.minimum(cutoff, largest)
    return Kept(largest, cutoff, jnp.sum(jnp.where(x >= cutoff, weight, 0.0)), None)
