"""Block sizes: chosen from shapes and types, never by a caller."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.types import TILE

THREADS = 128
"""Threads of a warpgroup; a block is one."""

WARP = 32
"""Threads of a warp: of a vector of so many elements or of a few, every warp has copies, and waits for no other."""

FEW = 8
"""32 bytes, the least that is read of memory."""

MAX_DRAFTS = THREADS - 1
"""Rows are decided on at once, a row a thread, the bonus row among them."""

VECTOR_BYTES = 16
"""The widest load of one thread."""

MAX_LOADS = 8
"""Vectors a thread asks for before it needs the first: 16 KiB in flight a block, several blocks a processor."""

MAX_TILES = 8
"""Tiles of a row that a block reads at once when a sequence emits, of elements of 2 bytes in whole vectors: the fastest
of 6, 8 and 10 at V 151,936 on an H100, at B 64, K 4 (49.9 us for 50.7 and 50.2) and with early exit at B 256, K 8 (212
for 215 and 217)."""

FEW_TILES = 3
"""A thread has registers for so many tiles of any elements."""

PROCESSORS = 132
"""Of a Hopper GPU."""

FINISHING = 4
"""Blocks that finish sequences for which a processor has registers at once."""

READING = 6
"""Blocks that read rows for which it has, at least."""

CLUSTERS = 16, 8, 4, 2
"""Blocks of a cluster, from as many as the hardware lets wait for each other."""

CHUNK_TILES = MAX_LOADS * THREADS * VECTOR_BYTES // (2 * TILE)
"""Tiles of a chunk of elements of 2 bytes."""

EARLY_EXIT_CLUSTER = 8
"""The largest cluster with early exit that was the fastest anywhere."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is spread over the machine.

    Attributes:
      blocks: Blocks that finish one sequence together.
      early_exit: Whether they read its rows too, one after the other until a draft is rejected, in one launch, as a
        cluster, which may wait for each other; else all rows are read in a launch before it, each chunk of each row
        by a block of its own, and the last block of a sequence to come finishes it alone.
      max_tiles: Tiles that a block reads at once when the sequence emits.
      pairs: Groups of tiles of two rows for one group of one row: two of them take the registers of one.
    """

    blocks: int
    early_exit: bool = False
    max_tiles: int = MAX_TILES
    pairs: int = 2


def choose(batch_size: int, num_draft: int, vocab_size: int, reads_draft: bool = False) -> Config:
    """The Config for B sequences of K drafts over V tokens; `reads_draft`: no normalizers were handed over.

    Rows after the first rejection are worth not reading where sequences fill the machine. On an H100, at V 151,936,
    bfloat16, early exit took 73 us for 88 at B 256, K 1, 140 for 173 at K 4 and 212 for 282 at K 8; 70 for 77 at B 64,
    K 8, and 83 for 93 at B 96, K 6; but 53 for 50 at B 64, K 4. Where the draft's rows are read beside the target's it
    saves less: 193 for 168 at B 256, K 2, 285 for 273 at K 4 (float32: 441 for 550) and 429 for 483 at K 8.
    """
    room = FINISHING * PROCESSORS
    cluster = _cluster(min(room // max(batch_size, 1), EARLY_EXIT_CLUSTER), vocab_size)
    full = batch_size >= PROCESSORS and num_draft >= (4 if reads_draft else 1)
    # Before that where rows are long enough to be read by more blocks.
    chunks_each = -(-num_tiles(vocab_size) // (CHUNK_TILES * cluster))
    large = batch_size >= 64 and num_draft >= 6 and batch_size * num_draft >= 512 and chunks_each >= 2
    if full or (large and not reads_draft):
        return Config(cluster, early_exit=True)
    # As many as run at once, of two tiles at least: fewer at B 1, or more, are slower.
    return Config(max(1, min(num_tiles(vocab_size) // 2, room // max(batch_size, 1))))


def choose_sigmoid(batch_size: int, vocab_size: int) -> Config:
    """The same of the sigmoid rule: the more blocks share a processor, the fewer tiles a block has registers for.

    The fastest of 2 to 10 tiles at B 1, 8, 16, 32, 64, 128 and 256, V 151,936, on an H100.
    """
    blocks = _cluster(max(2, FINISHING * PROCESSORS // max(batch_size, 1)), vocab_size)
    crowd = -(-batch_size * blocks // PROCESSORS)
    max_tiles = 10 if crowd <= 1 else 5 if crowd <= 2 or blocks == 2 else FEW_TILES
    return Config(blocks, max_tiles=max_tiles, pairs=5)


def num_tiles(vocab_size: int) -> int:
    """Tiles of a row, the last one possibly shorter."""
    return -(-vocab_size // TILE)


def row_lanes(num_rows: int) -> int:
    """Lanes of a vector with an element a row: few, of which every warp has copies, or a block's."""
    return next(lanes for lanes in (FEW, WARP, THREADS) if num_rows <= lanes)


def in_lanes(count: int) -> int:
    """The next multiple of the threads of a block."""
    return -(-count // THREADS) * THREADS


def _cluster(most: int, vocab_size: int) -> int:
    """The largest cluster of at most so many blocks, each with a tile at least."""
    return next((c for c in CLUSTERS if c <= most and c * TILE <= vocab_size), 1)


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the tiles of a row are shared out when it emits: in groups whose tiles are read and added up together.

    Attributes:
      size: Tiles of a group of one row.
      count: Groups of a row.
      pair_size: Tiles of a group where the draft's row is read beside it; `size` is a multiple.
      before: Tiles that the first group lacks. The last tile is the last one of its group: no other can be partial.
    """

    size: int
    count: int
    pair_size: int
    before: int

    @property
    def pairs(self) -> int:
        """Groups of two rows for one of one row."""
        return self.size // self.pair_size

    @property
    def num_slots(self) -> int:
        """Tiles of all groups, those that are lacking too."""
        return self.size * self.count


def groups(vocab_size: int, blocks: int, most: int, pairs: int) -> Groups:
    """The fewest groups of at most so many tiles a block, all of one size; `pairs` of them for one of one row."""
    tiles = num_tiles(vocab_size)
    share, most_pairs = -(-tiles // blocks), max(most // pairs, 1)
    pair_size = -(-share // -(-share // most_pairs))
    size = pair_size * max(1, min(pairs, most // pair_size, -(-share // pair_size)))
    count = -(-tiles // size)
    return Groups(size, count, pair_size, size * count - tiles)


def vector_size(dtype: DTypeLike) -> int:
    """Elements of one 16-byte load."""
    return VECTOR_BYTES // jnp.dtype(dtype).itemsize


def row_vector_size(dtype: DTypeLike, vocab_size: int) -> int:
    """Elements of the widest load that is aligned at the start of every row."""
    return math.gcd(vector_size(dtype), vocab_size)


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How a row is cut for reading: chunks of a few vectors a thread, the last one possibly shorter.

    Attributes:
      vec: Elements of a vector.
      lanes: Elements of a vector a thread, over the block.
      num_loads: Vectors a thread loads for a whole chunk.
      size: Elements of a chunk.
      count: Chunks of a row; where rows do not begin at a vector, one more may be needed.
      whole: Chunks that lie in their row whatever its alignment is.
      rest: Vectors a thread loads for a chunk that may not.
      aligned: Whether every row begins at a vector.
      tiles: Tiles of a chunk, where chunks are whole tiles of a row; else None.
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
    """How rows of V elements are cut."""
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
