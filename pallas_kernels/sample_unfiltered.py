"""Samples one token per row without filters, in two launches.

Launch `sample_read`, grid (sequence, block): each block reads a few tiles of one row, and writes their maximum and the
sum of each. No block waits for another; in `sample`, the blocks of a row wait for each other twice.

Launch `sample_emit`, grid (sequence,), one block per row: the first uniform picks a tile by its sum, the second a token
in that tile. The block waits for memory twice: for the sums, and for the tile, which is read again. Its uniforms are
computed before it waits for the first launch.

If rows do not begin at a multiple of 16 bytes, the launches of the token rule (`token`) read them and pick the token
instead, as bonus rows of sequences without drafts.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import emit, random, rows, scan, sync, tiles, token
from pallas_kernels.limits import Limits, fixed_row_limits, keeps_all
from pallas_kernels.types import TILE, Filter


class TileSums(NamedTuple):
    """Statistics of the tiles of each row in global memory, `[B, lanes]`.

    Attributes:
      top: Largest logit of the tiles of its block.
      total: Sum of exp((logit - top) * scale) over the tile.
    """

    top: Any
    total: Any


def supports(limits: Limits) -> bool:
    """Whether `sample` takes these parameters: a temperature above 0 that is a number, and no filter."""
    return keeps_all(limits) and fixed_row_limits(limits).greedy is None


def sample(
    logits: Float[Array, "B V"], limits: Limits, noise: random.Noise, *, config: sizes.Config | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples like `sample.sample`, with `limits` that `supports` accepts and any V of at least `TILE`.

    `config` is used only if the launches of `token` sample; `config.token_config` chooses it if None.
    """
    batch_size, vocab_size = logits.shape
    scale = fixed_row_limits(limits).scale
    drafts = jnp.zeros((batch_size, 0), jnp.int32)
    inputs = rows.make_inputs(logits[:, None], Filter(), None, Filter(), None, drafts, noise)

    def view(inputs):
        sequence = rows.sequence_view(inputs, vocab_size)
        # In the kernel the scale is a number, not an array that XLA would have to write.
        return sequence._replace(target=sequence.target._replace(filter=Filter(scale)))

    if sizes.row_vector_size(logits.dtype, vocab_size) == sizes.vector_size(logits.dtype):
        return _emit(inputs, _read(inputs, view, batch_size, vocab_size), view, batch_size)
    config = config or sizes.token_config(batch_size, vocab_size)

    def decide(inputs, read):
        sequence = view(inputs)
        return sequence, *token.decide_all(sequence, read, config.max_unrolled)

    def write(emission, tables, stop, row):
        del tables, row
        emission.outputs.accept_prob[emission.sequence.number, 0] = _scaled(stop.p_offset, scale) + stop.p_log_sum

    read = token.read_rows(inputs, batch_size, 1, vocab_size, view)
    out = token.emit_after(
        read, inputs, decide, lambda read: read.target_by_row, batch_size, 1, vocab_size, config, write
    )
    return out.tokens[:, 0], out.accept_prob[:, 0]


def _read(inputs: rows.Inputs, view_fn, batch_size: int, vocab_size: int) -> TileSums:
    """Launches `sample_read`."""
    size = sizes.sample_tiles(batch_size)
    num_blocks = -(-vocab_size // (size * TILE))

    def sample_read(inputs, out: TileSums):
        sync.start_dependent_launch()
        target, block = view_fn(inputs).target, lax.axis_index("block")
        # Only the last block can read past the end of a row.
        top, totals = lax.cond(
            block < vocab_size // (size * TILE),
            lambda: _sum_tiles(target, block, size, lambda x, tile: x),
            lambda: _sum_tiles(target, block, size, lambda x, tile: tiles.mask_tile(x, tile, -jnp.inf)),
        )
        for i, total in enumerate(totals):
            index = target.sequence, block * size + i
            out.top[index], out.total[index] = top, total

    lanes = batch_size, sizes.to_lanes(num_blocks * size)
    (out,) = plgpu.kernel(
        sample_read,
        out_type=(TileSums(*[jax.ShapeDtypeStruct(lanes, jnp.float32)] * 2),),
        grid=(batch_size, num_blocks),
        grid_names=("sequence", "block"),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs)
    return out


def _sum_tiles(target: rows.Rows, block: Any, size: int, mask_fn) -> tuple[jax.Array, list[jax.Array]]:
    """Largest logit of the tiles of a block, and the sum of exp((x - largest) * scale) of each.

    Not finite if they hold NaN or +inf; `LOWEST` and 0 if all are -inf.
    """
    read = [rows.load_tiles([(target, 0)], block * size + i) for i in range(size)]
    masked = [mask_fn(x, tile) for tile, (x,) in read]
    top = jnp.maximum(jnp.max(functools.reduce(jnp.maximum, masked).astype(jnp.float32)), rows.LOWEST)
    rate, vec = rows.exp2_rate(rows.scale_of(target)), read[0][0].vec
    weights = [jnp.exp2((x.astype(jnp.float32) - top) * rate) for x in masked]
    return top, scan.to_scalars(scan.sum_vectors(weights, vec), vec)


def _emit(inputs: rows.Inputs, read: TileSums, view_fn, batch_size: int) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Launches `sample_emit`."""

    def sample_emit(inputs, read: TileSums, tokens, normalizers, scratch):
        sequence = view_fn(inputs)
        target, scale = sequence.target, rows.scale_of(sequence.target)
        rate = rows.exp2_rate(scale)
        # Computed before the wait, which hides their latency.
        uniforms = scan.hold(scratch, random.emit_uniforms(inputs.draws, sequence.number))
        sync.wait_for_previous_launch()
        count = sizes.num_tiles(target.vocab_size)
        tops = tiles.load_first_lanes(read.top, (sequence.number,), count, -jnp.inf)
        totals = tiles.load_first_lanes(read.total, (sequence.number,), count, 0.0)
        top = jnp.max(tops)
        weights = totals * jnp.exp2((tops - top) * rate)
        # Not `weights > LEAST_WEIGHT`, which would drop NaN.
        weights = jnp.where(weights <= scan.LEAST_WEIGHT, 0.0, weights)
        number, total = scan.choose(scratch, weights, uniforms[0], tiles.lane_layout(weights.shape[0]))
        log_sum = jnp.log(total)
        normalizers[sequence.number] = _scaled(top, scale) + log_sum

        def draw():
            tile, (x,) = rows.load_tiles([(target, 0)], number)
            weights = tiles.mask_tile(jnp.exp2((x.astype(jnp.float32) - top) * rate), tile)
            index = scan.choose(scratch, weights, uniforms[1], tile.layout).number
            return jnp.clip(tile.first * tile.vec + index, 0, target.vocab_size - 1)

        regular = rows.is_finite(top + log_sum)
        tokens[sequence.number] = lax.cond(regular, draw, lambda: rows.first_largest_number(target, 0))

    integers, floats = (jax.ShapeDtypeStruct((batch_size,), dtype) for dtype in (jnp.int32, jnp.float32))
    return plgpu.kernel(
        sample_emit,
        out_type=(integers, floats),
        scratch_types=(scan.choose_scratch(),),
        grid=(batch_size,),
        grid_names=("sequence",),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs, read)


def _scaled(x, scale):
    return x if scale is None else x * scale
