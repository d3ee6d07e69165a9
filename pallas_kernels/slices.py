"""A row of logits in the registers of a cluster of blocks, and what the blocks leave for each other."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import candidates, config, sync
from pallas_kernels import tiles as tiling
from pallas_kernels.types import TILE

MAX_CLUSTER = 16
"""Blocks of the largest cluster."""

MAX_TILES = 64
"""Tiles of a row that a block holds: 8 elements of each a thread."""

LISTED = 128
"""Candidates that a block passes on, and those that are compared with each other."""

NUM_THRESHOLDS = 3
"""Thresholds of a round of the search."""


class Kept(NamedTuple):
    """One row's largest logit, smallest kept logit, and sum of `exp((x - largest) * scale)` over what is kept.

    The sum is NaN where the row is degenerate. `first` is the first index of the largest logit where the row is greedy;
    None where no row may be.
    """

    largest: Any
    cutoff: Any
    total: Any
    first: Any


class Exchange(NamedTuple):
    """Global memory through which the blocks of a cluster communicate, one row per cluster.

    Attributes:
      tops: Largest logit of a block, `[rows, MAX_CLUSTER]`.
      firsts: Its first index, of greedy rows.
      bounds: What the cutoff of top-k is not below, for all that a block knows.
      counts: Candidates of a block.
      lists: The candidates, `[rows, blocks, LISTED]`.
      sums: Sums at thresholds, of two rounds in turn, `[rows, 2, NUM_THRESHOLDS, MAX_CLUSTER]`.
    """

    tops: Any
    firsts: Any
    bounds: Any
    counts: Any
    lists: Any
    sums: Any


class Scratch(NamedTuple):
    """Shared memory of a block."""

    groups: Any
    of_groups: Any
    bound: Any
    listed: Any
    weights: Any
    counts: Any


class Slice(NamedTuple):
    """A block's share of a row: every `num_blocks`-th tile, -inf past the row's end, in registers.

    `flat` is the row's number in `logits`, `row` that in `Exchange`. `shared` is where a search keeps the tiles,
    `[tiles, TILE]` in shared memory: a loop over registers would be unrolled.
    """

    logits: Any
    flat: Any
    tiles: list[jax.Array]
    shared: Any
    barrier: Any
    layout: Any
    vec: int
    row: Any
    block: Any
    num_blocks: int
    vocab_size: int
    dtype: Any


def num_blocks(num_rows: int, vocab_size: int) -> int:
    """Blocks of a cluster: as many as give few rows the whole machine, at least so many that registers hold a row."""
    tiles = config.num_tiles(vocab_size)
    wanted = max(1, min(MAX_CLUSTER, config.EMITTING_BLOCKS * config.num_multiprocessors() // max(num_rows, 1), tiles))
    needed = -(-tiles // 20)
    size = max(1 << (wanted.bit_length() - 1), 1 << (needed - 1).bit_length())
    return min(size, MAX_CLUSTER)


def supports(vocab_size: int) -> bool:
    """Whether the registers of a cluster hold a row."""
    return config.num_tiles(vocab_size) <= MAX_CLUSTER * MAX_TILES // 2


def exchange(num_rows: int, blocks: int) -> Exchange:
    """Space for what the blocks of `num_rows` clusters leave for each other."""
    each = num_rows, MAX_CLUSTER
    return Exchange(
        jax.ShapeDtypeStruct(each, jnp.float32),
        jax.ShapeDtypeStruct(each, jnp.int32),
        jax.ShapeDtypeStruct(each, jnp.float32),
        jax.ShapeDtypeStruct(each, jnp.int32),
        jax.ShapeDtypeStruct((num_rows, blocks, LISTED), jnp.float32),
        jax.ShapeDtypeStruct((num_rows, 2, NUM_THRESHOLDS, MAX_CLUSTER), jnp.float32),
    )


def tiles_scratch(dtype: Any, vocab_size: int, blocks: int) -> Any:
    """Shared memory for a block's share of a row."""
    return plgpu.SMEM((-(-config.num_tiles(vocab_size) // blocks), TILE), dtype)


def scratch() -> Scratch:
    """Shared memory of a block."""
    return Scratch(
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((config.THREADS,), jnp.float32),
        plgpu.SMEM((1,), jnp.float32),
        plgpu.SMEM((LISTED,), jnp.float32),
        plgpu.SMEM((LISTED,), jnp.float32),
        candidates.counts_scratch(),
    )


def load_slice(
    ref: Any, vocab_size: int, row: Any, row_index: Any, block: Any, blocks: int, shared: Any, barrier: Any
) -> Slice:
    """Reads a block's share of row number `row` of a flat array; `row_index` is its number in `Exchange`."""
    count = -(-config.num_tiles(vocab_size) // blocks)
    tiles, tile = [], None
    for i in range(count):
        tile = tiling.locate_tile(jnp.int32(i * blocks) + block, vocab_size, [(ref, row)], False)
        # HBM -> registers: [TILE], vec elements a thread and load.
        x = tiling.load_tile(ref, vocab_size, row, tile)
        # No tile but those of the last round can reach past the row's end.
        tiles.append(tiling.mask_tile(x, tile, -jnp.inf) if i == count - 1 else x)
    assert tile is not None
    return Slice(
        ref, row, tiles, shared, barrier, tile.layout, tile.vec, row_index, block, blocks, vocab_size, ref.dtype
    )


def meet(part: Slice):
    """Waits for all blocks of the row, and sees what they wrote."""
    if part.num_blocks == 1:
        sync.sync_threads()
    else:
        sync.sync_cluster(part.barrier)


def of_blocks(ref: Any, part: Slice, nothing: Any) -> jax.Array:
    """[MAX_CLUSTER] numbers, one per block, and `nothing` where there is no block."""
    layout = tiling.lane_layout(MAX_CLUSTER)
    lane = plgpu.broadcasted_iota(jnp.int32, (MAX_CLUSTER,), 0, layout=layout)
    # L2 -> registers: copies in every warp.
    return jnp.where(lane < part.num_blocks, plgpu.load(ref, layout=layout, optimized=False), nothing)
