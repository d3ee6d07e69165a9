"""The second half of every rule: one token by the weights of one row, its tile first and then its place.

Code that runs once is fetched from memory as it runs, some 5 ns an instruction: loops are loops here, and not
unrolled, wherever that is shorter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _chunks as chunks
from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._launch import Operands, Results, fence
from pallas_kernels._sequence import Sequence

TILES_AT_ONCE = 4
"""Tiles whose loads are in flight together when a row is read a second time."""


class Emission(Sequence):
    """One sequence, and the blocks of a cluster that finish it. A rule says what its weights are.

    Attributes:
      results: Of all sequences.
      cluster: Blocks of the cluster; `block` is the number of this one.
      num_tiles: Tiles of a row.
    """

    def __init__(self, inputs: Operands, results: Results, barrier: Any, vocab_size: int, cluster: int):
        super().__init__(inputs, vocab_size)
        self.results, self.barrier, self.cluster = results, barrier, cluster
        self.block = lax.axis_index("block")
        self.num_tiles = -(-vocab_size // config.TILE)

    def weights(self, state: Any, number: jax.Array, target_only: bool = False) -> tuple[jax.Array, rows.Tile]:
        """[TILE] weights of the emitting row, and where they stand."""
        raise NotImplementedError

    def meet(self):
        """Waits for all blocks of the cluster, and sees what they wrote."""
        fence()
        if self.cluster > 1:
            plgpu.barrier_arrive(self.barrier)
            plgpu.barrier_wait(self.barrier)
            fence()

    def share(self, count: int, fn: Any):
        """`fn(i)` for this block's share of `count` things."""

        def one(i, carry):
            fn(self.block + i * self.cluster)
            return carry

        lax.fori_loop(0, (count - self.block + self.cluster - 1) // self.cluster, one, jnp.int32(0))

    def load_tile(self, row: Any, number: jax.Array, with_draft: bool) -> tuple[list[jax.Array], rows.Tile]:
        """[TILE] logits of a target row, and of the draft's beside it, in float32; and where they stand."""
        pair = [("target", row), ("draft", self.draft_row(row))][: 1 + with_draft]
        places = [(getattr(self.inputs, of), self.row(of, r)) for of, r in pair]
        tile = rows.tile_at(number, self.vocab_size, places)
        return [rows.load_tile(ref, self.vocab_size, r, tile) for ref, r in places], tile

    def sum_tiles(self, state: Any):
        """Writes this block's share of the tile sums of the emitting row. A tile past the last adds up to 0."""

        def some(target_only, group):
            numbers = [group * TILES_AT_ONCE + j for j in range(TILES_AT_ONCE)]
            for number, weights in zip(numbers, [self.weights(state, n, target_only)[0] for n in numbers], strict=True):
                self.results.sums[self.sequence, number] = jnp.sum(weights)

        def all_of_it(target_only):
            self.share(-(-self.num_tiles // TILES_AT_ONCE), functools.partial(some, target_only))

        if self.num_draft:
            pl.when(state.rejecting)(lambda: all_of_it(False))
        # The draft's row is of no interest where none of its tokens was rejected.
        pl.when(~state.rejecting)(lambda: all_of_it(True))

    def sum_target_tiles(self, state: Any):
        """Writes all tile sums of the target alone, by one block: the rare case of an empty residual."""

        def one(number, carry):
            self.results.sums[self.sequence, number] = jnp.sum(self.weights(state, number, target_only=True)[0])
            return carry

        lax.fori_loop(0, self.num_tiles, one, jnp.int32(0))
        fence()

    def lanes(self, ref: Any, at: tuple[Any, ...]) -> jax.Array:
        """A row of a small array, one element or a few a thread."""
        # L2 -> registers: [width].
        return plgpu.load(ref.at[at], layout=_small(ref.shape[-1]))

    def by_tile(self, ref: Any, at: tuple[Any, ...], nothing: float) -> jax.Array:
        """A number of every tile, and `nothing` behind them."""
        width = ref.shape[-1]
        lane = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=_small(width))
        return jnp.where(lane < self.num_tiles, self.lanes(ref, at), nothing)

    def sums(self) -> jax.Array:
        """What `sum_tiles` wrote, and zeros behind it."""
        return self.by_tile(self.results.sums, (self.sequence,), 0.0)

    def sample(self, state: Any) -> jax.Array:
        """A token: a tile by the first uniform, an element of it by the second."""
        number = rows.search(self.sums(), self.inputs.emit[self.sequence, 0])
        weights, tile = self.weights(state, number)
        return tile.first * tile.vec + rows.search(weights, self.inputs.emit[self.sequence, 1])

    def first_number(self, row: jax.Array) -> jax.Array:
        """The first largest logit that is a number, of a row that makes no distribution; 0 where none is."""

        def one(chunk, carry):
            top, first = carry
            new, at = chunks.first_largest(
                self.inputs.target, self.vocab_size, self.row("target", row), chunk, numbers_only=True
            )
            return jnp.maximum(top, new), jnp.where(new > top, at, first)

        return lax.fori_loop(0, self.num_chunks("target"), one, (jnp.float32(-jnp.inf), jnp.int32(0)))[1]

    def write_last(self, count: jax.Array, token: jax.Array, flags: tuple[int, ...], holds: tuple[Any, ...]):
        """The last token, behind `count` accepted drafts; and the status, a sum of the flags that hold."""
        out, sequence = self.results, self.sequence
        out.tokens[sequence, count] = token
        out.num_accepted[sequence] = count
        held = [jnp.where(hold, flag, 0) for flag, hold in zip(flags, holds, strict=True)]
        out.status[sequence] = sum(held, jnp.int32(0))

    def write_drafts(self, count: jax.Array, others: Any):
        """The accepted drafts, and padding behind the last token, by the last block; `others(i)` writes the rest."""

        def one(i, carry):
            token = self.inputs.tokens[self.sequence, self.draft_row(i)] if self.num_draft else jnp.int32(-1)

            @pl.when(i != count)
            def _():
                self.results.tokens[self.sequence, i] = jnp.where(i < count, token, -1)

            others(i)
            return carry

        @pl.when(self.block == self.cluster - 1)
        def _():
            lax.fori_loop(0, self.num_draft + 1, one, jnp.int32(0))


def _small(width: int) -> Any:
    """The layout of a small array of 32-bit numbers."""
    return plgpu.Layout.WG_STRIDED((width,), vec_size=min(config.vector_size(jnp.float32), width // config.THREADS))
