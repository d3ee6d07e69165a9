"""Sampling of the last token, shared by the rules: first a tile of the emitting row, then a token of the tile.

This is bound by latency, so a block issues the loads of as many tiles as its registers hold, and sums them together.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, random, rows, scan, sync, tiles
from pallas_kernels.types import DEGENERATE_DRAFT, DEGENERATE_TARGET, EMPTY_RESIDUAL, PAD_TOKEN, TILE, Verification

COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=scan.EXCHANGE_BYTES)
"""Approximate exponentials of the hardware, and shared memory for `scan.sum_vectors`."""

Sources = list[tuple[rows.Rows, Any]]
"""Rows that are read together, as pairs of a model's rows and a row index: the target's, and possibly the draft's."""


class Emission(NamedTuple):
    """State of one block among those that together emit one sequence's token.

    Attributes:
      sequence: The sequence.
      outputs: The `Verification` of all sequences; `log_probs` is None where a rule writes none. None in a launch that
        emits nothing.
      sums: Sums of tiles in global memory, `[n, slots]`, through which the blocks communicate.
      scratch: Shared memory, from `scan.choose_scratch`.
      groups: The tiles' groups.
      num_blocks: Blocks of the sequence.
      block: Index of this block.
      uniforms: The two uniforms of the token.
      meet_fn: `() -> bool`, a barrier of the blocks. True in the one block that continues and sees all writes.
      sums_row: Row of `sums` to which the sums of tiles are written.
    """

    sequence: rows.Sequence
    outputs: Any
    sums: Any
    scratch: Any
    groups: config.Groups
    num_blocks: int
    block: jax.Array
    uniforms: list[jax.Array]
    meet_fn: Callable[[], jax.Array]
    sums_row: Any


def output_types(batch_size: int, num_draft: int, num_slots: int, num_summed: int = 1) -> tuple[Any, Any]:
    """The types of the outputs, and of the sums of tiles of `num_summed` rows per sequence."""

    def array(*shape, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    return Verification(
        tokens=array(batch_size, num_draft + 1),
        num_accepted=array(batch_size),
        log_probs=array(batch_size, num_draft + 1, dtype=jnp.float32),
        accept_prob=array(batch_size, max(num_draft, 1), dtype=jnp.float32),
        status=array(batch_size),
    ), array(batch_size * num_summed, config.to_lanes(num_slots), dtype=jnp.float32)


def without_padding(out: Verification) -> Verification:
    """Removes the column that `output_types` adds to `accept_prob` if there are no drafts."""
    return out._replace(accept_prob=out.accept_prob[:, : out.tokens.shape[1] - 1])


def make_emission(
    sequence: rows.Sequence,
    outputs: Any,
    sums: Any,
    scratch: Any,
    groups: config.Groups,
    num_blocks: int,
    meet_fn: Callable[[jax.Array], jax.Array],
) -> Emission:
    """Returns the `Emission` of this block. `meet_fn` is passed whether it is the last on axis "block"."""
    block = lax.axis_index("block")
    is_last = block == num_blocks - 1

    def meet():
        if num_blocks == 1:
            sync.sync_threads()
            return is_last
        return meet_fn(is_last)

    # Computed where they are used, in the one block that emits: the compiler moves them there.
    uniforms = random.emit_uniforms(sequence.inputs.draws, sequence.number)
    return Emission(sequence, outputs, sums, scratch, groups, num_blocks, block, uniforms, meet, sequence.number)


def for_each(count: Any, fn: Callable[[Any], None]):
    """Calls `fn(i)` for the numbers below `count`, in a loop."""

    def step(i, carry):
        fn(i)
        return carry

    lax.fori_loop(0, count, step, jnp.int32(0))


def share(emission: Emission, count: int, fn: Callable[[Any], None]):
    """Calls `fn(i)` for this block's share of the numbers below `count`."""
    num_steps = (count - emission.block + emission.num_blocks - 1) // emission.num_blocks
    for_each(num_steps, lambda i: fn(emission.block + i * emission.num_blocks))


def target_source(emission: Emission, row: Any) -> Sources:
    """The target's row."""
    return [(emission.sequence.target, row)]


def all_sources(emission: Emission, row: Any) -> Sources:
    """The target's row, and the draft's if the draft has logits."""
    sequence = emission.sequence
    draft = [] if sequence.draft is None else [(sequence.draft, sequence.draft_row(row))]
    return [(sequence.target, row), *draft]


def groups_of(emission: Emission, sources: Sources) -> int:
    """Number of groups of tiles in these rows."""
    return emission.groups.count * (emission.groups.pairs if len(sources) == 2 else 1)


def read_group(emission: Emission, sources: Sources, group: Any) -> list[tuple[tiles.Tile, list[jax.Array]]]:
    """Loads the tiles of a group, each with its logits per source. Only the last tile can be partial."""
    size = emission.groups.pair_size if len(sources) == 2 else emission.groups.size
    first = group * size - emission.groups.before
    return [rows.load_tiles(sources, first + j) for j in range(size)]


def prefetch_draft(emission: Emission, numbers: Iterable[Any]):
    """Starts to load this block's first group of tiles of some of the draft's rows into the L2.

    Does nothing without `log_normalizers`, because the launch before then reads these rows. Rows that do not begin at a
    vector are left out too, because the copy takes multiples of 16 bytes.
    """
    draft, groups = emission.sequence.draft, emission.groups
    if draft is None or emission.sequence.inputs.log_normalizers is None:
        return
    vec = config.vector_size(draft.logits.dtype)
    if config.row_vector_size(draft.logits.dtype, draft.vocab_size) != vec:
        return
    first = emission.block * groups.pair_size - groups.before
    low = jnp.maximum(first * TILE, 0)
    high = jnp.minimum((first + groups.pair_size) * TILE, draft.vocab_size)

    @pl.when(low < high)
    def _():
        for row in numbers:
            # In vectors first, which shows the compiler that the address is a multiple of one.
            start = rows.flat_row(draft, row) * (draft.vocab_size // vec) + low // vec
            sync.prefetch(draft.logits, start * vec, high - low)


def write_sums(emission: Emission, group: Any, weights: list[jax.Array], read: list[tuple[tiles.Tile, Any]]):
    """Writes the sum of the weights of each tile of a group, 0 for the empty tiles before the row."""
    tile = read[-1][0]
    weights[-1] = tiles.mask_tile(weights[-1], tile)
    size = len(weights)
    sums = scan.sum_vectors(weights, tile.vec)
    if emission.groups.before:
        number = group * size + scan.vector_numbers(size, tile.vec)
        sums = jnp.where(number >= emission.groups.before, sums, 0.0)
    # Registers -> L2: [tiles of a group].
    tiles.store(emission.sums.at[emission.sums_row, pl.ds(group * size, size)], sums)


def sum_group(emission: Emission, sources: Sources, weights_fn: Callable, group: Any):
    """Writes the tile sums of `weights_fn(logits of each source, tile)` of one group."""
    read = read_group(emission, sources, group)
    write_sums(emission, group, [weights_fn(logits, tile) for tile, logits in read], read)


def sum_alone(emission: Emission, group_fn: Callable[[Any], None]):
    """Calls `group_fn` for all groups of the target's row in this block, for the rare case of an empty residual."""
    for_each(emission.groups.count, group_fn)
    sync.sync_threads()


def choose_tile(emission: Emission) -> tuple[jax.Array, jax.Array]:
    """Chooses a tile by the first uniform from the sums in global memory; also returns the sum of all weights."""
    sums = tiles.load_first_lanes(emission.sums, (emission.sums_row,), emission.groups.num_slots, 0.0)
    slot, total = scan.choose(emission.scratch, sums, emission.uniforms[0], tiles.lane_layout(sums.shape[0]))
    return slot - emission.groups.before, total


def sum_tiles(emission: Emission) -> jax.Array:
    """The sum of all weights of a row, from the sums in global memory."""
    return jnp.sum(tiles.load_first_lanes(emission.sums, (emission.sums_row,), emission.groups.num_slots, 0.0))


def choose_token(emission: Emission, sources: Sources, weights_fn: Callable, number: jax.Array) -> jax.Array:
    """Chooses a token of tile `number` by the second uniform."""
    tile, logits = rows.load_tiles(sources, number)
    weights = tiles.mask_tile(weights_fn(logits, tile), tile)
    index = scan.choose(emission.scratch, weights, emission.uniforms[1], tile.layout).number
    return jnp.clip(tile.first * tile.vec + index, 0, emission.sequence.target.vocab_size - 1)


def write_last(emission: Emission, num_accepted: jax.Array, token: jax.Array, degenerate, distrusted, empty):
    """Writes the token after the accepted drafts, and the status: the sum of the flags that hold."""
    sequence, outputs = emission.sequence.number, emission.outputs
    outputs.tokens[sequence, num_accepted] = token
    outputs.num_accepted[sequence] = num_accepted
    flags = ((degenerate, DEGENERATE_TARGET), (distrusted, DEGENERATE_DRAFT), (empty, EMPTY_RESIDUAL))
    outputs.status[sequence] = sum([jnp.where(holds, flag, 0) for holds, flag in flags], jnp.int32(0))


def write_drafts(emission: Emission, num_accepted: jax.Array, token_fn: Callable, others_fn: Callable):
    """Writes the accepted drafts and the padding, and calls `others_fn(i)` for each position."""
    sequence = emission.sequence

    def write(i):
        token = token_fn(sequence.draft_row(i)) if sequence.num_draft else jnp.int32(PAD_TOKEN)

        @pl.when(i != num_accepted)
        def _():
            emission.outputs.tokens[sequence.number, i] = jnp.where(i < num_accepted, token, PAD_TOKEN)

        others_fn(i)

    for_each(sequence.num_draft + 1, write)
