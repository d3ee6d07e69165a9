"""Block sizes: chosen from shapes and types, never by a caller."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

TILE = 1024
"""Elements of a row whose weights are added up before any choice is made: the first level of sampling."""

THREADS = 128
"""Threads of a warpgroup; a block is one."""

MAX_DRAFTS = THREADS - 1
"""Rows are decided on at once, a row a thread, the bonus row among them."""

VECTOR_BYTES = 16
"""The widest load of one thread."""

MAX_LOADS = 8
"""Vectors a thread asks for before it needs the first: 16 KiB in flight a block, several blocks a processor."""

MAX_TILES = 10
"""Tiles of a row that a block reads at once when a sequence emits, of elements of 2 bytes in whole vectors."""

PROCESSORS = 132
"""Of a Hopper GPU."""

CLUSTERS = 16, 8, 4, 2
"""Blocks a sequence, from as many as the hardware lets wait for each other."""

MANY_DRAFTS = 4
"""From so many on, rows after the first rejection are worth not reading, where sequences fill the machine: at B 256
and V 151,936 on an H100, early exit takes 155 us for 182 with 4 drafts, and 224 for 286 with 8."""

EARLY_EXIT_CLUSTER, EARLY_EXIT_TILES = 2, 6
"""The fastest of 1, 2 and 4 blocks, and of 2, 4, 6 and 10 tiles, there: fewer registers let a third block in."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How the work is spread over the machine.

    Attributes:
      cluster: Blocks that finish one sequence together, and may wait for each other.
      early_exit: Whether they read its rows too, one after the other until a draft is rejected, in one launch;
        else all rows are read in a launch before it, each chunk of each row by a block of its own.
      max_tiles: Tiles that a block reads at once when the sequence emits.
    """

    cluster: int
    early_exit: bool = False
    max_tiles: int = MAX_TILES


def choose(batch_size: int, num_draft: int, vocab_size: int) -> Config:
    """The Config for B sequences of K drafts over V tokens."""
    if batch_size >= PROCESSORS and num_draft >= MANY_DRAFTS and vocab_size >= EARLY_EXIT_CLUSTER * TILE:
        return Config(EARLY_EXIT_CLUSTER, early_exit=True, max_tiles=EARLY_EXIT_TILES)
    # As many as there is room for at once, four blocks a processor.
    return Config(_cluster(4 * PROCESSORS // max(batch_size, 1), vocab_size))


def choose_sigmoid(batch_size: int, vocab_size: int) -> int:
    """Blocks a sequence of the sigmoid rule: two of them fit a processor."""
    return _cluster(max(2, 2 * PROCESSORS // max(batch_size, 1)), vocab_size)


def num_tiles(vocab_size: int) -> int:
    """Tiles of a row, the last one possibly shorter."""
    return -(-vocab_size // TILE)


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


def groups(vocab_size: int, cluster: int, most: int, pairs: int) -> Groups:
    """The fewest groups of at most so many tiles a block, all of one size; `pairs` of them for one of one row."""
    tiles = num_tiles(vocab_size)
    share = -(-tiles // cluster)
    size = -(-share // -(-share // most))
    pairs = min(pairs, size)
    size = -(-size // pairs) * pairs
    count = -(-tiles // size)
    return Groups(size, count, size // pairs, size * count - tiles)


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
