"""Block sizes, chosen from shapes, dtypes and the device. Times in this file are of an H100."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.types import TILE

THREADS = 128
"""Threads per block: one warpgroup."""

WARP = 32
"""Threads per warp. Of a vector of at most so many elements every warp holds a copy, and waits for no other."""

MIN_LANES = 8
"""Elements of the smallest vector: 32 bytes, the least that is read from memory."""

MAX_DRAFTS = THREADS - 1
"""Most drafts per sequence: all rows are decided on at once, one per thread, and the bonus row is one of them."""

VECTOR_BYTES = 16
"""Bytes of the widest load of a thread."""

MAX_LOADS = 8
"""Loads a thread issues before it needs the first: 16 KiB in flight per block, several blocks per multiprocessor."""

MAX_TILES = 8
"""Tiles of the emitting row that a block reads at once, of 2-byte elements in whole vectors: the fastest of 6, 8 and
10 at V 151,936, at B 64, K 4 (49.9 us; 50.7 and 50.2) and with early exit at B 256, K 8 (212; 215 and 217)."""

FEW_TILES = 3
"""Tiles for which a thread has registers whatever their elements are."""

DEFAULT_MULTIPROCESSORS = 132
"""Multiprocessors of an H100, assumed where a program is lowered without a GPU."""

EMITTING_BLOCKS = 4
"""Blocks that emit tokens for which a multiprocessor has registers at once."""

READING_BLOCKS = 6
"""Blocks that read rows for which a multiprocessor has registers at once, at least."""

CLUSTERS = 16, 8, 4, 2
"""Blocks per cluster, from the most that the hardware allows."""

CHUNK_TILES = MAX_LOADS * THREADS * VECTOR_BYTES // (2 * TILE)
"""Tiles of a chunk of 2-byte elements."""

EARLY_EXIT_CLUSTER = 8
"""The largest cluster that was the fastest anywhere with early exit."""

MAX_UNROLLED = 64
"""Chunks of a row whose sums are joined without a loop: with hundreds the compiler gives up."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The work of one sequence, spread over blocks.

    Attributes:
      blocks: Blocks that emit one sequence's token together.
      max_tiles: Tiles of the emitting row that a block reads at once.
      pairs: Groups of tiles of two rows per group of one row: two of them take the registers of one.
      max_unrolled: Chunks of a row whose sums are joined without a loop.
    """

    blocks: int
    max_tiles: int = MAX_TILES
    pairs: int = 2
    max_unrolled: int = MAX_UNROLLED


def num_multiprocessors() -> int:
    """Multiprocessors of the GPU that this process has; of an H100 where it has none."""
    if jax.default_backend() != "gpu":
        return DEFAULT_MULTIPROCESSORS
    return jax.devices()[0].core_count


def exits_early(batch_size: int, num_draft: int, vocab_size: int, reads_draft: bool) -> bool:
    """Whether the token rule is faster if each sequence reads no row after its first rejection.

    So it is where sequences fill the machine. At V 151,936, bfloat16, early exit took 73 us (two launches: 88) at
    B 256, K 1; 140 (173) at K 4; 212 (282) at K 8; 70 (77) at B 64, K 8; 83 (93) at B 96, K 6; but 53 (50) at B 64,
    K 4. If the draft's rows are read too, it saves less: 193 (168) at B 256, K 2; 285 (273) at K 4 (float32: 441 for
    550) and 429 (483) at K 8.
    """
    if batch_size >= num_multiprocessors() and num_draft >= (4 if reads_draft else 1):
        return True
    # Smaller batches gain where rows are long enough to be read by several blocks.
    blocks = early_exit_config(batch_size, vocab_size).blocks
    chunks_each = -(-num_tiles(vocab_size) // (CHUNK_TILES * blocks))
    large = batch_size >= 64 and num_draft >= 6 and batch_size * num_draft >= 512 and chunks_each >= 2
    return large and not reads_draft


def early_exit_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the token rule with early exit."""
    blocks = EMITTING_BLOCKS * num_multiprocessors() // max(batch_size, 1)
    return Config(_cluster(min(blocks, EARLY_EXIT_CLUSTER), vocab_size))


def token_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the token rule in two launches: as many as run at once, of two tiles each at least."""
    blocks = EMITTING_BLOCKS * num_multiprocessors() // max(batch_size, 1)
    return Config(max(1, min(num_tiles(vocab_size) // 2, blocks)))


def sigmoid_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the sigmoid rule. The more of them share a multiprocessor, the fewer tiles fit a block's registers.

    The fastest of 2 to 10 tiles at B 1, 8, 16, 32, 64, 128 and 256, V 151,936.
    """
    multiprocessors = num_multiprocessors()
    blocks = _cluster(max(2, EMITTING_BLOCKS * multiprocessors // max(batch_size, 1)), vocab_size)
    sharing = -(-batch_size * blocks // multiprocessors)
    max_tiles = 10 if sharing <= 1 else 5 if sharing <= 2 or blocks == 2 else FEW_TILES
    return Config(blocks, max_tiles=max_tiles, pairs=5)


def _cluster(most: int, vocab_size: int) -> int:
    """The largest cluster of at most so many blocks, each with one tile at least."""
    return next((blocks for blocks in CLUSTERS if blocks <= most and blocks * TILE <= vocab_size), 1)


def num_tiles(vocab_size: int) -> int:
    """Tiles per row, the last one possibly shorter."""
    return -(-vocab_size // TILE)


def row_lanes(num_rows: int) -> int:
    """Length of a vector with one element per row: a few, of which every warp holds a copy, or a block's."""
    return next(lanes for lanes in (MIN_LANES, WARP, THREADS) if num_rows <= lanes)


def to_lanes(count: int) -> int:
    """The next multiple of the threads of a block."""
    return -(-count // THREADS) * THREADS


def vector_size(dtype: DTypeLike) -> int:
    """Elements per 16-byte load."""
    return VECTOR_BYTES // jnp.dtype(dtype).itemsize


def row_vector_size(dtype: DTypeLike, vocab_size: int) -> int:
    """Elements of the widest load that is aligned at the start of every row."""
    return math.gcd(vector_size(dtype), vocab_size)


@dataclasses.dataclass(frozen=True)
class Groups:
    """The tiles of an emitting row in groups, which are read and summed together.

    Attributes:
      size: Tiles per group of one row.
      count: Groups per row.
      pair_size: Tiles per group where the draft's row is read beside the target's; `size` is a multiple.
      before: Tiles that the first group lacks, so that the row's last tile is the last of its group. No other tile
        can be partial.
    """

    size: int
    count: int
    pair_size: int
    before: int

    @property
    def pairs(self) -> int:
        """Groups of two rows per group of one row."""
        return self.size // self.pair_size

    @property
    def num_slots(self) -> int:
        """Tiles of all groups, those that the first one lacks included."""
        return self.size * self.count


def groups(vocab_size: int, dtypes: list[DTypeLike], config: Config) -> Groups:
    """The fewest groups of one size whose tiles fit a thread's registers; `dtypes` are those of the rows read.

    `config.max_tiles` is for 2-byte elements in whole vectors; of others half as many fit.
    """
    types = [jnp.dtype(dtype) for dtype in dtypes]
    narrow = all(d.itemsize == 2 and row_vector_size(d, vocab_size) == vector_size(d) for d in types)
    most = config.max_tiles if narrow else max(config.max_tiles // 2, min(config.max_tiles, FEW_TILES))
    tiles = num_tiles(vocab_size)
    share, most_pairs = -(-tiles // config.blocks), max(most // config.pairs, 1)
    pair_size = -(-share // -(-share // most_pairs))
    size = pair_size * max(1, min(config.pairs, most // pair_size, -(-share // pair_size)))
    count = -(-tiles // size)
    return Groups(size, count, pair_size, size * count - tiles)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """A row cut for reading into chunks of a few vectors per thread, the last one possibly shorter.

    Attributes:
      vec: Elements per vector.
      lanes: Elements of one vector per thread, over the block.
      num_loads: Vectors per thread of a whole chunk.
      size: Elements per chunk.
      count: Chunks per row; rows that do not begin at a vector may need one more.
      whole: Chunks that lie in their row whatever its alignment is.
      rest: Vectors per thread of a chunk that may not.
      aligned: Whether every row begins at a vector.
      tiles: Tiles per chunk, where chunks are whole tiles of a row; else None.
    """

    vec: int
    lanes: int
    num_loads: int
    size: int
    count: int
    whole: int
    rest: int
    aligned: bool
    tiles: int | None


def chunks(dtype: DTypeLike, vocab_size: int) -> Chunks:
    """The chunks of rows of V elements."""
    vec = vector_size(dtype)
    lanes = THREADS * vec
    num_loads = max(1, min(MAX_LOADS, vocab_size // lanes))
    size = num_loads * lanes
    aligned = vocab_size % vec == 0
    longest = vocab_size + (0 if aligned else vec - 1)
    whole = vocab_size // size
    rest = -(-(vocab_size - whole * size) // lanes) if aligned else num_loads
    tiles = size // TILE if aligned and size % TILE == 0 else None
    return Chunks(vec, lanes, num_loads, size, -(-longest // size), whole, rest, aligned, tiles)
