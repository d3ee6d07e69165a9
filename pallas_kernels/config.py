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
"""Threads per warp. Each warp holds a copy of a vector of at most this length, so its sums need no other warp."""

MIN_LANES = 8
"""Elements of the smallest vector: 32 bytes, the smallest transaction with memory."""

MAX_DRAFTS = THREADS - 1
"""Maximum drafts per sequence: acceptance takes one thread per row, the bonus row included."""

VECTOR_BYTES = 16
"""Bytes of the widest load of a thread."""

MAX_LOADS = 8
"""Loads a thread issues before it needs the first: 16 KiB in flight per block, several blocks per multiprocessor."""

MAX_TILES = 8
"""Tiles of the emitting row that a block reads at once, for 2-byte elements in 16-byte loads. With 6, 8 and 10 at
V 151,936: 50.7, 49.9 and 50.2 us at B 64, K 4."""

MAX_FILTERED_TILES = 5
"""`MAX_TILES` of rows with a cutoff, which take more registers. With 8, a thread takes 168 instead of 112, so three
emitting blocks instead of four fit a multiprocessor, and B 64, K 4 takes 149 us instead of 145."""

FEW_TILES = 3
"""Tiles that fit a thread's registers for every dtype and load width."""

DEFAULT_MULTIPROCESSORS = 132
"""Multiprocessors of an H100, assumed where a program is lowered without a GPU."""

EMITTING_BLOCKS = 4
"""Emitting blocks that fit the registers of one multiprocessor."""

READING_BLOCKS = 6
"""Minimum number of row-reading blocks that fit the registers of one multiprocessor."""

CLUSTERS = 16, 8, 4, 2
"""Possible blocks per cluster; 16 is the hardware's maximum."""

CHUNK_TILES = MAX_LOADS * THREADS * VECTOR_BYTES // (2 * TILE)
"""Tiles of a chunk of 2-byte elements."""

PREFETCHED_BATCH = 1
"""Largest batch of which all rows of the draft are loaded into the L2 ahead, though one per sequence will be read: at
V 151,936, bfloat16, K 4 on an H200 7.5 us instead of 8.0 at B 1, but 13.6 instead of 13.0 at B 8."""

FEWEST_BLOCKS = 8
"""Minimum blocks that emit a sequence's token. In large batches they are more than run concurrently, but those of
sequences that accepted all drafts end at once. With 2, 4, 8 and 16 on an H200, V 151,936, bfloat16, two launches took
73, 63, 62 and 65 us at B 256, K 1, and 136, 134, 132 and 136 at K 4."""

FEWEST_AT_ONCE = 8
"""Minimum blocks of each row if the block rule sums the tiles of all rows at the same time."""

BLOCK_RULE_BLOCKS = 19
"""Minimum blocks of a sequence in the block rule that sum its rows one after the other. Of 10, 13, 19 and 38, 19 were
the fastest in the version without rounds."""

EARLY_EXIT_BLOCKS = 5000
"""Minimum number of blocks that read rows with drafts if rows after a rejection are skipped."""

IN_TURN_LOGITS = 32_000_000
"""Minimum number of logits in one row of all sequences, the draft's counted if they are read, if early exit reads
`IN_TURN_CHUNKS` chunks per block."""

IN_TURN_CHUNKS = 3
"""Chunks per block there: a block takes about a microsecond to find that its row is not needed. But where a row of the
batch is short, blocks of the next row start before it is decided. See bench/NOTES.md."""

MAX_UNROLLED = 64
"""Maximum chunks of a row whose sums are combined in an unrolled loop; the compiler fails on hundreds."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Launch configuration: how the work of one sequence is split over blocks.

    Attributes:
      blocks: Blocks that emit one sequence's token together.
      max_tiles: Tiles of the emitting row that a block reads at once.
      pairs: Maximum ratio of group sizes: tiles per group of one row over tiles per group of two rows,
        whose tiles take twice the registers.
      max_unrolled: Maximum chunks of a row whose sums are combined in an unrolled loop.
      row_parts: Block rule: K + 1 if each row has `blocks` of its own that sum it, 1 if all rows share them.
      rounds: Block rule: most rounds that a block tries at once; fewer in large vocabularies. With 4 a thread takes 120
        registers, so that four blocks fit a multiprocessor; with 8 they do not.
      chunks: Early exit: chunks of a row that a block reads.
      prefetches: Whether the draft's rows are loaded into the L2 while the target's are read, if its normalizers are
        given: else they are read too.
    """

    blocks: int
    max_tiles: int = MAX_TILES
    pairs: int = 2
    max_unrolled: int = MAX_UNROLLED
    row_parts: int = 1
    rounds: int = 1
    chunks: int = 1
    prefetches: bool = False


def num_multiprocessors() -> int:
    """Number of multiprocessors of this process's GPU, or of an H100 without one."""
    if jax.default_backend() != "gpu":
        return DEFAULT_MULTIPROCESSORS
    return jax.devices()[0].core_count


def exits_early(batch_size: int, num_draft: int, vocab_size: int, dtypes: list[DTypeLike]) -> bool:
    """Whether the token rule is faster if it skips rows after a rejection, which takes a third launch.

    It is if the rows take longer to read than the launch takes. `dtypes` are those of the rows that are read: the
    target's, and the draft's without normalizers. On an H200, V 151,936, bfloat16, microseconds of a call in a compiled
    loop with early exit and in two launches: 54 and 62 at B 64, K 6 (7,296 blocks read rows with drafts), 60 and 66 at
    B 96, K 4, 75 and 82 at B 128, K 4, 168 and 225 at B 256, K 8. At B 64, K 4 (4,864 blocks) it is 48 and 50, but the
    kernels take as long, and outside of a loop the GPU waits for the host between the first launches.
    """
    num_chunks = sum(chunks(dtype, vocab_size).count for dtype in dtypes)
    return num_draft >= 2 and batch_size * num_draft * num_chunks >= EARLY_EXIT_BLOCKS


def token_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the token rule: as many as run concurrently, each with at least two tiles, or `FEWEST_BLOCKS`."""
    blocks = max(EMITTING_BLOCKS * num_multiprocessors() // max(batch_size, 1), FEWEST_BLOCKS)
    return Config(max(1, min(num_tiles(vocab_size) // 2, blocks)), prefetches=batch_size <= PREFETCHED_BATCH)


def early_exit_config(batch_size: int, vocab_size: int, reads_draft: bool) -> Config:
    """Blocks of the token rule with early exit."""
    per_block = IN_TURN_CHUNKS if batch_size * vocab_size * (1 + reads_draft) >= IN_TURN_LOGITS else 1
    return dataclasses.replace(token_config(batch_size, vocab_size), chunks=per_block)


def filtered_token_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the token rule with top-k, top-p or min-p."""
    config = token_config(batch_size, vocab_size)
    return dataclasses.replace(config, max_tiles=MAX_FILTERED_TILES, prefetches=False)


def block_config(batch_size: int) -> Config:
    """Blocks of the block rule, which try rounds, and how many each tries at once.

    H200, V 151,936, bfloat16, K 4, B 64: with 8 blocks of 4 rounds 38.6 us, with 16 of 2 43.8. Before blocks formed
    clusters: with 8 of 4 37.0, with 8 of 8 42.2.
    """
    if batch_size <= 8:
        return Config(16, rounds=1)
    return Config(16, rounds=2) if 16 * batch_size <= EMITTING_BLOCKS * num_multiprocessors() else Config(8, rounds=4)


def block_sum_config(batch_size: int, num_rows: int, vocab_size: int) -> Config:
    """Blocks of the block rule that sum tiles of rows: some for each row, or for all rows one after the other."""
    concurrent, most = EMITTING_BLOCKS * num_multiprocessors(), max(1, num_tiles(vocab_size) // 2)
    apart = concurrent // max(batch_size * num_rows, 1)
    if apart >= FEWEST_AT_ONCE:
        return Config(min(most, apart), max_tiles=MAX_FILTERED_TILES, row_parts=num_rows)
    return Config(min(most, max(concurrent // batch_size, BLOCK_RULE_BLOCKS)), max_tiles=MAX_FILTERED_TILES)


def samples_in_two_launches(dtype: DTypeLike, batch_size: int, vocab_size: int) -> bool:
    """Whether rows without filters are sampled faster in two launches.

    They are if every row begins at a vector (at V 151,936, bfloat16, 5.1 us instead of 6.1 at B 1, 6.3 instead of 7.6
    at B 8), or if they fill more than half of the GPU.
    """
    aligned = row_vector_size(dtype, vocab_size) == vector_size(dtype)
    return aligned or batch_size * num_tiles(vocab_size) >= 32 * num_multiprocessors()


def lists_first(num_blocks: int) -> bool:
    """Whether rows that `num_blocks` blocks sample with filters are listed in a launch of their own.

    In one launch and in two, V 151,936, bfloat16, top-k 20: 10.4 and 10.1 us for 16 blocks (B 1), 12.3 and 11.9 for 128
    (B 8), 24.4 and 21.8 for 512 (B 32), 27.4 and 22.9 for 512 (B 64).
    """
    return num_blocks >= 384


def sample_tiles(batch_size: int) -> int:
    """Tiles per block that reads a row without filters, of which another block picks the token.

    With 2, 3 and 4, V 151,936, bfloat16: 11.9, 12.3 and 12.5 us at B 64; at B 128 18.5 or 21.9 (with 2, from call to
    call) and 18.8 (with 4).
    """
    return 2 if batch_size <= 64 else 4


def sigmoid_config(batch_size: int, vocab_size: int) -> Config:
    """Blocks of the sigmoid rule. The more blocks share a multiprocessor, the fewer tiles fit a block's registers.

    `max_tiles` was the fastest of 2 to 10 at B 1, 8, 16, 32, 64, 128 and 256, V 151,936.
    """
    multiprocessors = num_multiprocessors()
    blocks = _cluster(max(2, EMITTING_BLOCKS * multiprocessors // max(batch_size, 1)), vocab_size)
    sharing = -(-batch_size * blocks // multiprocessors)
    max_tiles = 10 if sharing <= 1 else 5 if sharing <= 2 or blocks == 2 else FEW_TILES
    return Config(blocks, max_tiles=max_tiles, pairs=5)


def _cluster(most: int, vocab_size: int) -> int:
    """The largest cluster size of at most `most` blocks such that each block has at least one tile."""
    return next((blocks for blocks in CLUSTERS if blocks <= most and blocks * TILE <= vocab_size), 1)


def num_tiles(vocab_size: int) -> int:
    """Tiles per row, the last one possibly shorter."""
    return -(-vocab_size // TILE)


def row_lanes(num_rows: int) -> int:
    """Padded length of a vector with one element per row: 8 or 32 (each warp holds a copy), or one per thread."""
    return next(lanes for lanes in (MIN_LANES, WARP, THREADS) if num_rows <= lanes)


def to_lanes(count: int) -> int:
    """Rounds up to a multiple of the threads of a block."""
    return -(-count // THREADS) * THREADS


def vector_size(dtype: DTypeLike) -> int:
    """Elements per 16-byte load."""
    return VECTOR_BYTES // jnp.dtype(dtype).itemsize


def row_vector_size(dtype: DTypeLike, vocab_size: int) -> int:
    """Elements of the widest load that is aligned at the start of every row."""
    return math.gcd(vector_size(dtype), vocab_size)


@dataclasses.dataclass(frozen=True)
class Groups:
    """Partition of the tiles of an emitting row into groups, which are read and summed together.

    Attributes:
      size: Tiles per group of one row.
      count: Groups per row.
      pair_size: Tiles per group if the draft's row is read together with the target's; divides `size`.
      before: Number of empty tiles at the start of the first group, so that the row's last tile, the only one that
        can be partial, is the last of its group.
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
        """Tiles of all groups, the empty ones of the first group included."""
        return self.size * self.count


def groups(vocab_size: int, dtypes: list[DTypeLike], config: Config) -> Groups:
    """The fewest groups of equal size that fit a thread's registers; `dtypes` are those of the rows that are read.

    `config.max_tiles` holds for 2-byte elements in 16-byte loads; otherwise half as many tiles fit.
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
    """Partition of a row into chunks of a few vectors per thread; the last chunk may be shorter.

    Attributes:
      vec: Elements per vector.
      lanes: Elements of a block's load of one vector per thread.
      num_loads: Vectors per thread of a whole chunk.
      size: Elements per chunk.
      count: Chunks per row; rows that do not begin at a vector may need one more.
      whole: Chunks that lie inside their row for every alignment of it.
      rest: Vectors per thread of a chunk that may extend beyond its row.
      aligned: Whether every row begins at a vector.
      tiles: Tiles per chunk; None if chunks do not consist of whole tiles.
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
