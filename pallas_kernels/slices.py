"""Loads a row of logits into the registers of a cluster of blocks; defines the memory that the blocks share.

Blocks of a cluster exchange per-block results through global memory (`Exchange`), ordered by the cluster barrier
(`sync_blocks`). Each block also has scratch in its own shared memory (`Scratch`).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
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

COPIED_AT_ONCE = 4
"""Tiles that `copy_to_shared` holds in registers at once."""

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
      tokens: The indices of the candidates of each block, int32 `[rows, blocks, MAX_CANDIDATES]`, or None.
      sums: Each block's count or sum for each threshold of the search, `[rows, 2, NUM_THRESHOLDS, MAX_CLUSTER]`.
        Consecutive rounds alternate between the two buffers of axis 1, so that a block can write the next round's
        sums while another block still reads those of this round.
    """

    tops: Any
    firsts: Any
    bounds: Any
    counts: Any
    lists: Any
    tokens: Any
    sums: Any


class Scratch(NamedTuple):
    """Shared memory of a block.

    Attributes:
      position_max: Maximum over a block's tiles at each position of a tile, `[TILE]`.
      group_max: Maxima of groups of logits, `[THREADS]`.
      bound: Smallest candidate, `[1]`.
      listed: List of candidates, `[MAX_CANDIDATES]`.
      weights: `exp((x - largest) * scale)` of each candidate x, `[MAX_CANDIDATES]`.
      numbers: One int32 per listed candidate, `[MAX_CANDIDATES]`, or None: its index in the concatenation of the
        block's tiles; after the lists of all blocks are merged, its token.
      counts: Scratch of `candidates.collect`.
    """

    position_max: Any
    group_max: Any
    bound: Any
    listed: Any
    weights: Any
    numbers: Any
    counts: Any


class Slice(NamedTuple):
    """A block's share of a row: tiles `block`, `block + num_blocks`, ...

    Attributes:
      logits: All rows of all sequences, flat, in global memory.
      flat: Index of the row in `logits`.
      tiles: Registers, `[TILE]` each, -inf past the end of the row; empty before `load_slice`.
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
        None,
        jax.ShapeDtypeStruct((num_rows, 2, NUM_THRESHOLDS, MAX_CLUSTER), jnp.float32),
    )


def token_lists(num_rows: int, blocks: int) -> Any:
    """Type of `Exchange.tokens`."""
    return jax.ShapeDtypeStruct((num_rows, blocks, MAX_CANDIDATES), jnp.int32)


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
        None,
        candidates.counts_scratch(),
    )


def locate_slice(
    ref: Any, vocab_size: int, row: Any, row_index: Any, block: Any, blocks: int, shared: Any, barrier: Any
) -> Slice:
    """Returns a block's share of row `row` of the flat array `ref`, without its tiles.

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
    tile = tiling.locate_tile(jnp.int32(0), vocab_size, [(ref, row)])
    return Slice(ref, row, [], shared, barrier, tile.layout, tile.vec, row_index, block, blocks, vocab_size, ref.dtype)


def load_slice(part: Slice) -> Slice:
    """Loads the tiles of a block's share into registers."""
    count = -(-config.num_tiles(part.vocab_size) // part.num_blocks)
    # Only the last tile of a block can extend past the end of the row.
    return part._replace(tiles=[_load_tile(part, jnp.int32(i), i == count - 1) for i in range(count)])


def store_slice(part: Slice):
    """Copies the tiles that `load_slice` loaded to `part.shared`."""
    for i, x in enumerate(part.tiles):
        # Registers -> shared memory: [TILE].
        tiling.store(part.shared.at[i], x)


def copy_to_shared(part: Slice):
    """Copies a block's share from global memory to `part.shared`, a few tiles at a time.

    Slower than `load_slice`, but with fewer registers.
    """
    count = part.shared.shape[0]

    def copy(start, size, masked):
        tiles = [_load_tile(part, start + i, masked) for i in range(size)]
        for i, x in enumerate(tiles):
            # Registers -> shared memory: [TILE].
            tiling.store(part.shared.at[start + i], x)

    def step(i, carry):
        copy(i * COPIED_AT_ONCE, COPIED_AT_ONCE, False)
        return carry

    groups = (count - 1) // COPIED_AT_ONCE
    lax.fori_loop(0, groups, step, jnp.int32(0))
    copy(jnp.int32(groups * COPIED_AT_ONCE), count - groups * COPIED_AT_ONCE, True)


def _load_tile(part: Slice, i: Any, masked: bool) -> jax.Array:
    """Loads the i-th tile of a block's share; if `masked`, with -inf past the end of the row."""
    tile = tiling.locate_tile(i * part.num_blocks + part.block, part.vocab_size, [(part.logits, part.flat)])
    # HBM -> registers: [TILE], vec elements per thread and load.
    x = tiling.load_tile(part.logits, part.vocab_size, part.flat, tile)
    return tiling.mask_tile(x, tile, -jnp.inf) if masked else x


def sync_blocks(num_blocks: int, barrier: Any):
    """Barrier of all blocks of a cluster: after it, each of them sees the writes that the others made before it."""
    if num_blocks == 1:
        sync.sync_threads()
    else:
        sync.sync_cluster(barrier)


def load_per_block(ref: Any, index: tuple[Any, ...], part: Slice, fill: float | int) -> jax.Array:
    """Loads the last axis at `index`: a value per block of the cluster, then `fill`. Each warp holds a copy."""
    return tiling.load_first_lanes(ref, index, part.num_blocks, fill)
