"""Loads a row of logits into the registers of a cluster of blocks; defines the memory that the blocks share.

Blocks of a cluster exchange per-block results through global memory (`Exchange`), ordered by the cluster barrier
(`sync_blocks`). Each block also has scratch in its own shared memory (`Scratch`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import candidates, config, sync
from pallas_kernels import tiles as tiling
from pallas_kernels.types import TILE

MAX_CLUSTER = 16
"""Maximum blocks per cluster."""

MAX_TILES = 64
"""Tiles of 2-byte elements that would fill the 256 registers of a thread, 8 elements of each tile per thread."""

MAX_CANDIDATES = 128
"""Capacity of a list of candidates: of the list of each block, and of the merged list of a row."""

NUM_THRESHOLDS = 3
"""Thresholds that each round of the search compares with the row."""


class Kept(NamedTuple):
    """The logits of a row that the filters keep.

    Attributes:
      largest: Largest logit of the row.
      cutoff: Smallest kept logit.
      total: Sum of `exp((x - largest) * scale)` over the kept logits x; NaN if the row is degenerate.
      first: First index of the largest logit; set in greedy rows only. None if no row can be greedy.
    """

    largest: Any
    cutoff: Any
    total: Any
    first: Any


class Exchange(NamedTuple):
    """Global memory through which the blocks of a cluster communicate, one row of each array per cluster.

    Attributes:
      tops: Largest logit of each block's share, `[rows, MAX_CLUSTER]`.
      firsts: First index of that logit in greedy rows, `[rows, MAX_CLUSTER]`.
      bounds: Lower bound of the row's top-k cutoff, from each block's share alone, `[rows, MAX_CLUSTER]`.
      counts: Number of each block's candidates, more than `MAX_CANDIDATES` if its list is incomplete or was not made,
        `[rows, MAX_CLUSTER]`.
      lists: The candidates of each block, `[rows, blocks, MAX_CANDIDATES]`.
      sums: Each block's count or sum for each threshold of the search, `[rows, 2, NUM_THRESHOLDS, MAX_CLUSTER]`.
        Consecutive rounds alternate between the two buffers of axis 1, so that a block can write the next round's
        sums while another block still reads those of this round.
    """

    tops: Any
    firsts: Any
    bounds: Any
    counts: Any
    lists: Any
    sums: Any


class Scratch(NamedTuple):
    """Shared memory of a block.

    Attributes:
      position_max: Maximum over a block's tiles at each position of a tile, `[TILE]`.
      group_max: Maxima of groups of logits, `[THREADS]`.
      bound: Smallest candidate, `[1]`.
      listed: List of candidates, `[MAX_CANDIDATES]`.
      weights: `exp((x - largest) * scale)` of each candidate x, `[MAX_CANDIDATES]`.
      counts: Scratch of `candidates.collect`.
    """

    position_max: Any
    group_max: Any
    bound: Any
    listed: Any
    weights: Any
    counts: Any


class Slice(NamedTuple):
    """A block's share of a row: tiles `block`, `block + num_blocks`, ... in registers.

    Attributes:
      logits: All rows of all sequences, flat, in global memory.
      flat: Index of the row in `logits`.
      tiles: Registers, `[TILE]` each, -inf past the end of the row.
      shared: Shared memory for a copy of the tiles, `[tiles, TILE]`. Loops over tiles read this copy, because a loop
        over registers must be unrolled.
      barrier: Scratch of the cluster barrier.
      layout: Layout of each of `tiles`.
      vec: Elements per load of a thread.
      row: Index of the row in `Exchange`.
      block: Index of the block in its cluster.
      num_blocks: Blocks of the cluster.
      vocab_size: V.
      dtype: Dtype of the logits.
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
    """Blocks per cluster, a power of two of at most `MAX_CLUSTER`.

    Enough blocks that few rows fill the GPU, and enough that the registers of a cluster hold a row.
    """
    tiles = config.num_tiles(vocab_size)
    concurrent = max(
        1, min(MAX_CLUSTER, config.EMITTING_BLOCKS * config.num_multiprocessors() // max(num_rows, 1), tiles)
    )
    # 20 tiles of 2-byte elements take 80 registers of a thread.
    needed = -(-tiles // 20)
    size = max(1 << (concurrent.bit_length() - 1), 1 << (needed - 1).bit_length())
    return min(size, MAX_CLUSTER)


def supports(vocab_size: int) -> bool:
    """Whether the registers of the largest cluster hold a row: its 2-byte elements take at most half of them."""
    return config.num_tiles(vocab_size) <= MAX_CLUSTER * MAX_TILES // 2


def exchange(num_rows: int, blocks: int) -> Exchange:
    """Types of the `Exchange` of `num_rows` clusters of `blocks` blocks."""
    per_block = num_rows, MAX_CLUSTER
    return Exchange(
        jax.ShapeDtypeStruct(per_block, jnp.float32),
        jax.ShapeDtypeStruct(per_block, jnp.int32),
        jax.ShapeDtypeStruct(per_block, jnp.float32),
        jax.ShapeDtypeStruct(per_block, jnp.int32),
        jax.ShapeDtypeStruct((num_rows, blocks, MAX_CANDIDATES), jnp.float32),
        jax.ShapeDtypeStruct((num_rows, 2, NUM_THRESHOLDS, MAX_CLUSTER), jnp.float32),
    )


def tiles_scratch(dtype: Any, vocab_size: int, blocks: int) -> Any:
    """Scratch for a copy of a block's share of a row, `[tiles, TILE]` in shared memory."""
    return plgpu.SMEM((-(-config.num_tiles(vocab_size) // blocks), TILE), dtype)


def scratch() -> Scratch:
    """Allocates `Scratch`."""
    return Scratch(
        plgpu.SMEM((TILE,), jnp.float32),
        plgpu.SMEM((config.THREADS,), jnp.float32),
        plgpu.SMEM((1,), jnp.float32),
        plgpu.SMEM((MAX_CANDIDATES,), jnp.float32),
        plgpu.SMEM((MAX_CANDIDATES,), jnp.float32),
        candidates.counts_scratch(),
    )


def load_slice(
    ref: Any, vocab_size: int, row: Any, row_index: Any, block: Any, blocks: int, shared: Any, barrier: Any
) -> Slice:
    """Loads a block's share of row `row` of the flat array `ref`.

    Args:
      ref: Rows of V logits, flat, in global memory.
      vocab_size: V.
      row: Index of the row in `ref`.
      row_index: Index of the row in `Exchange`.
      block: Index of the block in its cluster.
      blocks: Blocks of the cluster.
      shared: Shared memory from `tiles_scratch`.
      barrier: Scratch of the cluster barrier.
    """
    count = -(-config.num_tiles(vocab_size) // blocks)
    tiles, tile = [], None
    for i in range(count):
        tile = tiling.locate_tile(jnp.int32(i * blocks) + block, vocab_size, [(ref, row)], False)
        # HBM -> registers: [TILE], vec elements per thread and load.
        x = tiling.load_tile(ref, vocab_size, row, tile)
        # Only the last tile of a block can extend past the end of the row.
        tiles.append(tiling.mask_tile(x, tile, -jnp.inf) if i == count - 1 else x)
    assert tile is not None
    return Slice(
        ref, row, tiles, shared, barrier, tile.layout, tile.vec, row_index, block, blocks, vocab_size, ref.dtype
    )


def sync_blocks(part: Slice):
    """Barrier of all blocks of the row: after it, each of them sees the writes that the others made before it."""
    if part.num_blocks == 1:
        sync.sync_threads()
    else:
        sync.sync_cluster(part.barrier)


def load_per_block(ref: Any, part: Slice, fill: Any) -> jax.Array:
    """Loads `[MAX_CLUSTER]` values, one per block of the cluster, with `fill` after its last block."""
    layout = tiling.lane_layout(MAX_CLUSTER)
    lane = plgpu.broadcasted_iota(jnp.int32, (MAX_CLUSTER,), 0, layout=layout)
    # L2 -> registers: [MAX_CLUSTER], a copy in every warp.
    return jnp.where(lane < part.num_blocks, plgpu.load(ref, layout=layout, optimized=False), fill)
