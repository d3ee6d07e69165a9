"""Block sizes: chosen from shapes and types, never by a caller."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

TILE = 1024
"""Elements of a row whose weights are added up before any choice is made: the first level of sampling."""

THREADS = 128
"""Threads of a warpgroup; a block is one."""

VECTOR_BYTES = 16
"""The widest load of one thread."""

MAX_LOADS = 8
"""Vectors a thread asks for before it needs the first: 16 KiB in flight a block, several blocks a processor."""


RESIDENT = 2 * 132
"""Blocks at work at once: two on each processor of a Hopper GPU. Three fit, and are slower: see bench/NOTES.md."""

CLUSTERS = 16, 12, 8, 6, 4, 3, 2
"""Blocks a sequence, from as many as the hardware lets wait for each other."""


@dataclasses.dataclass(frozen=True)
class Config:
    """How one sequence is spread over the machine.

    Attributes:
      cluster: Blocks that work on one sequence, and may wait for each other.
      early_exit: Whether rows are read one after the other until a draft is rejected, or all at once.
    """

    cluster: int
    early_exit: bool = False


def choose(batch_size: int, num_draft: int, vocab_size: int) -> Config:
    """The Config for B sequences of K drafts over V tokens: all blocks at once on the machine, or one a sequence.

    Blocks of a second wave would find it half empty.
    """
    del num_draft
    for cluster in CLUSTERS:
        # A block without a whole tile to itself has nothing to do.
        if cluster * batch_size <= RESIDENT and cluster * TILE <= vocab_size:
            return Config(cluster)
    return Config(1)


def vector_size(dtype: DTypeLike) -> int:
    """Elements of one 16-byte load."""
    return VECTOR_BYTES // jnp.dtype(dtype).itemsize


def row_vector_size(dtype: DTypeLike, vocab_size: int) -> int:
    """Elements of the widest load that is aligned at the start of every row."""
    return math.gcd(vector_size(dtype), vocab_size)


def num_loads(dtype: DTypeLike, vocab_size: int) -> int:
    """Vectors a thread loads a step; a row has at least one step."""
    return max(1, min(MAX_LOADS, vocab_size // (THREADS * vector_size(dtype))))
