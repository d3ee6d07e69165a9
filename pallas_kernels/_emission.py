"""The second half of every rule: one token by the weights of one row, its tile first and then its place.

A block spends its time waiting here, so it asks for as many tiles as its registers hold before it needs the first,
and adds all of them up at once.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels import _sums as summing
from pallas_kernels import _waits as waits
from pallas_kernels._launch import Operands, Results
from pallas_kernels._sequence import Sequence
from pallas_kernels.types import DEGENERATE_DRAFT, DEGENERATE_TARGET, EMPTY_RESIDUAL


def groups_of(inputs: Operands, vocab_size: int, chosen: config.Config) -> config.Groups:
    """How the tiles of the emitting rows are shared out.

    `chosen.max_tiles` is for elements of 2 bytes in whole vectors; of others a thread has registers for half as many.
    """
    dtypes = [ref.dtype for ref in (inputs.target, inputs.draft) if ref is not None]
    narrow = all(d.itemsize == 2 and config.row_vector_size(d, vocab_size) == config.vector_size(d) for d in dtypes)
    most = chosen.max_tiles if narrow else max(chosen.max_tiles // 2, min(chosen.max_tiles, config.FEW_TILES))
    return config.groups(vocab_size, chosen.blocks, most, chosen.pairs)


class Emission(Sequence):
    """One sequence, and the blocks that finish it. A rule says what its weights are.

    Attributes:
      results: Of all sequences.
      room: Shared memory to search in.
      meeting: Where the blocks of the sequence meet: `waits.Arrivals`, or a cluster's barrier.
      num_blocks: Blocks of the sequence; `block` is the number of this one. The first one writes drafts.
      groups: Of tiles.
      emit: The two uniforms of the token that is emitted.
    """

    def __init__(
        self,
        inputs: Operands,
        results: Results,
        room: Any,
        meeting: Any,
        vocab_size: int,
        groups: config.Groups,
        num_blocks: int,
    ):
        super().__init__(inputs, vocab_size)
        self.results, self.room, self.meeting = results, room, meeting
        self.num_blocks, self.block = num_blocks, lax.axis_index("block")
        self.is_last = self.block == num_blocks - 1
        self.groups = groups
        # Asked for at once: behind a barrier each would be waited for.
        self.emit = [inputs.emit[self.sequence, i] for i in range(2)]

    def weights(self, state: Any, loaded: list[jax.Array], tile: rows.Tile, rejecting: bool | None) -> jax.Array:
        """[TILE] weights of the emitting row, in float32, of its logits and the draft's beside them.

        Anything past the row's end. `rejecting`: whether a draft was rejected, where that is known to be so; `state`
        says it otherwise. Of the target alone if it is False, whatever the state says.
        """
        raise NotImplementedError

    def meet(self) -> jax.Array:
        """Whether this block emits: the one that goes on alone, and sees what all of the sequence wrote."""
        if self.num_blocks == 1:
            waits.meet_threads()
        elif isinstance(self.meeting, waits.Arrivals):
            return waits.arrive(self.meeting, self.sequence, self.num_blocks)
        else:
            waits.meet_cluster(self.meeting)
        return self.is_last

    def share(self, count: int, fn: Any):
        """`fn(i)` for this block's share of `count` things."""

        def one(i, carry):
            fn(self.block + i * self.num_blocks)
            return carry

        lax.fori_loop(0, (count - self.block + self.num_blocks - 1) // self.num_blocks, one, jnp.int32(0))

    def pair(self, row: Any, with_draft: bool) -> list[tuple[str, Any]]:
        """A target row, and the draft's beside it."""
        return [("target", row), ("draft", self.draft_row(row))][: 1 + with_draft]

    def read_group(self, row: Any, group: Any, with_draft: bool):
        """The tiles of a group, and their logits. No tile but the last can be partial."""
        size = self.groups.pair_size if with_draft else self.groups.size
        first = group * size - self.groups.before
        return [self.load_tile(self.pair(row, with_draft), first + j) for j in range(size)]

    def write_sums(self, group: Any, weights: list[jax.Array], tiles: list[rows.Tile]):
        """Writes the sums of a group's weights down, 0 for tiles that it lacks."""
        weights[-1] = rows.only_inside(weights[-1], tiles[-1])
        size, vec = len(weights), tiles[0].vec
        sums = summing.sum_each(weights, vec)
        if self.groups.before:
            number = group * size + summing.number_each(size, vec)
            sums = jnp.where(number >= self.groups.before, sums, 0.0)
        # Registers -> L2: [tiles of a group].
        summing.store_each(self.results.sums.at[self.sequence, pl.ds(group * size, size)], sums)

    def reads_draft(self, rejecting: bool | None) -> bool:
        """Whether the draft's row is read beside the target's."""
        return self.inputs.draft is not None and rejecting is not False

    def sum_group(self, state: Any, group: Any, rejecting: bool):
        """Reads the tiles of one group, and writes their sums."""
        read = self.read_group(state.num_accepted, group, self.reads_draft(rejecting))
        weights = [self.weights(state, loaded, tile, rejecting) for tile, loaded in read]
        self.write_sums(group, weights, [tile for tile, _ in read])

    def sum_tiles(self, state: Any):
        """Writes this block's share of the tile sums of the emitting row."""
        if self.num_draft:
            pl.when(state.rejecting)(lambda: self.sum_groups(state, True))
        # The draft's row is of no interest where none of its tokens was rejected.
        pl.when(~state.rejecting)(lambda: self.sum_groups(state, False))

    def sum_groups(self, state: Any, rejecting: bool):
        """The same, where it is known whether a draft was rejected."""
        count = self.groups.count * (self.groups.pairs if self.reads_draft(rejecting) else 1)
        self.share(count, lambda group: self.sum_group(state, group, rejecting))

    def sum_target_tiles(self, state: Any):
        """Writes all tile sums of the target alone, by one block: the rare case of an empty residual."""

        def one(group, carry):
            self.sum_group(state, group, rejecting=False)
            return carry

        lax.fori_loop(0, self.groups.count, one, jnp.int32(0))
        waits.meet_threads()

    def lanes(self, ref: Any, at: tuple[Any, ...]) -> jax.Array:
        """A row of a small array, one element or a few a thread."""
        # L2 -> registers: [width].
        return plgpu.load(ref.at[at], layout=rows.singles(ref.shape[-1]), optimized=False)

    def first_lanes(self, ref: Any, at: tuple[Any, ...], count: int, nothing: float) -> jax.Array:
        """The same, and `nothing` behind so many."""
        width = ref.shape[-1]
        lane = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=rows.singles(width))
        return jnp.where(lane < count, self.lanes(ref, at), nothing)

    def choose_tile(self) -> tuple[jax.Array, jax.Array]:
        """A tile by the first uniform, from the sums that were written; and the sum of all weights."""
        sums = self.first_lanes(self.results.sums, (self.sequence,), self.groups.num_slots, 0.0)
        found = summing.running_sums(self.room, sums)
        slot = summing.first_beyond(found, self.emit[0] * found.total)
        return slot - self.groups.before, found.total

    def choose_token(self, state: Any, number: jax.Array) -> jax.Array:
        """A token of a tile by the second uniform."""
        pair = self.pair(state.num_accepted, self.inputs.draft is not None)
        tile, loaded = self.load_tile(pair, number, in_shared=True)
        weights = rows.only_inside(self.weights(state, loaded, tile, None), tile)
        index = summing.first_of_tile_beyond(self.room, weights, self.emit[1])
        return jnp.clip(tile.first * tile.vec + index, 0, self.vocab_size - 1)

    def first_number(self, row: jax.Array) -> jax.Array:
        """The first largest logit that is a number, of a row that makes no distribution; 0 where none is."""

        def one(tile, x, carry):
            top, first = carry
            x = rows.only_inside(x.astype(jnp.float32), tile, -jnp.inf)
            x = jnp.where(x == x, x, -jnp.inf)
            return jnp.maximum(top, x), jnp.where(x > top, tile.place(), first)

        tops, places = self.fold_tiles("target", row, one, (-jnp.inf, 0))
        top = jnp.max(tops)
        return jnp.where(top > -jnp.inf, jnp.min(jnp.where(tops == top, places, rows.NOWHERE)), 0)

    def write_last(self, count: jax.Array, token: jax.Array, holds: tuple[Any, Any, Any]):
        """The last token, behind `count` accepted drafts; and the status, a sum of the flags that hold."""
        out, sequence = self.results, self.sequence
        out.tokens[sequence, count] = token
        out.num_accepted[sequence] = count
        flags = DEGENERATE_TARGET, DEGENERATE_DRAFT, EMPTY_RESIDUAL
        held = [jnp.where(hold, flag, 0) for flag, hold in zip(flags, holds, strict=True)]
        out.status[sequence] = sum(held, jnp.int32(0))

    def write_drafts(self, count: jax.Array, token_of: Any, others: Any):
        """The accepted drafts, and padding behind the last token, by the first block; `others(i)` writes the rest."""

        def one(i, carry):
            token = token_of(self.draft_row(i)) if self.num_draft else jnp.int32(-1)

            @pl.when(i != count)
            def _():
                self.results.tokens[self.sequence, i] = jnp.where(i < count, token, -1)

            others(i)
            return carry

        @pl.when(self.block == 0)
        def _():
            lax.fori_loop(0, self.num_draft + 1, one, jnp.int32(0))
