"""The second half of every rule: one token by the weights of one row, found in three levels."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _chunks as chunks
from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._launch import Operands, Results, fence
from pallas_kernels._sequence import Sequence


class Emission(Sequence):
    """One sequence, and the blocks of a cluster that finish it. A rule says what its weights are.

    Attributes:
      results: Of all sequences.
      cluster: Blocks of the cluster; `block` is the number of this one.
      span: Tiles whose weights are added up together.
    """

    def __init__(self, inputs: Operands, results: Results, barrier: Any, vocab_size: int, cluster: int):
        super().__init__(inputs, vocab_size)
        self.results, self.barrier, self.cluster = results, barrier, cluster
        self.block = lax.axis_index("block")
        self.span = config.span(inputs.target.dtype)
        self.num_sums = -(-vocab_size // (self.span * config.TILE))

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

    def sum_span(self, state: Any, number: jax.Array, target_only: bool = False):
        """Writes the sum of weights of one span of tiles of the emitting row."""
        tiles = [self.weights(state, number * self.span + j, target_only)[0] for j in range(self.span)]
        self.results.sums[self.sequence, number] = jnp.sum(functools.reduce(jnp.add, tiles))

    def lanes(self, ref: Any, at: tuple[Any, ...], count: Any, nothing: float | int) -> jax.Array:
        """The first `count` elements of a short row, and `nothing` behind them."""
        width = ref.shape[-1]
        layout = plgpu.Layout.WG_STRIDED((width,), vec_size=width // config.THREADS)
        # L2 -> registers: [width].
        values = plgpu.load(ref.at[at], layout=layout)
        lane = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout)
        return jnp.where(lane < count, values, plgpu.layout_cast(jnp.full((width,), nothing, ref.dtype), layout))

    def sums(self, count: Any) -> jax.Array:
        """What `sum_span` wrote of the first spans."""
        return self.lanes(self.results.sums, (self.sequence,), count, 0.0)

    def sample(self, state: Any, sums: jax.Array, target_only: bool = False) -> jax.Array:
        """A token: a span of tiles by the first uniform, a tile of it by the same, an element by the second."""
        wanted = self.inputs.emit[self.sequence, 0] * jnp.sum(sums)
        number, running = rows.search(sums, wanted)
        tile, found = number * self.span, jnp.bool_(False)
        for j in range(self.span):
            here = jnp.sum(self.weights(state, number * self.span + j, target_only)[0])
            running = running + here
            # Where rounding leaves none, the last of them that has weight.
            tile = jnp.where(~found & (here > 0), number * self.span + j, tile)
            found = found | ((here > 0) & (running > wanted))
        weights, place = self.weights(state, tile, target_only)
        index, _ = rows.search(weights, self.inputs.emit[self.sequence, 1] * jnp.sum(weights))
        return place.first * place.vec + index

    def first_number(self, row: jax.Array) -> jax.Array:
        """The first largest logit that is a number, of a row that makes no distribution; 0 where none is."""

        def one(chunk, carry):
            top, first = carry
            new, at = chunks.first_largest(
                self.inputs.target, self.vocab_size, self.row("target", row), chunk, numbers_only=True
            )
            return jnp.maximum(top, new), jnp.where(new > top, at, first)

        return lax.fori_loop(0, self.num_chunks("target"), one, (jnp.float32(-jnp.inf), jnp.int32(0)))[1]

    def write(self, count: jax.Array, drafts: list[jax.Array], token: jax.Array, status: jax.Array):
        """The accepted drafts, then the token, then padding."""
        out, sequence = self.results, self.sequence
        for i, drafted in enumerate([*drafts, token]):
            out.tokens[sequence, i] = jnp.where(i < count, drafted, jnp.where(i == count, token, -1))
        out.num_accepted[sequence] = count
        out.status[sequence] = status
