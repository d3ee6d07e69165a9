"""Samples one token per row with top-k or min-p, from a list of the few logits that may be kept.

Each block of a row writes its candidates and their tokens to global memory (`cutoff.list_candidates`). Every block of
the row's cluster then merges these lists, and finds the cutoff among the merged candidates. All kept logits are among
them, so block 0 picks the token without another pass over the row: the first uniform picks a tile by the sum of its
kept weights, the second a token in it.

Rows that are greedy or degenerate, and rows whose lists do not hold all candidates, are searched and sampled by the
whole cluster (`sample.sample_shared`), which reads them again.

Few rows take one launch. Where lists have a launch of their own (`config.lists_first`), no block waits while it reads.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import candidates, config, random, scan, slices, sync
from pallas_kernels import sample as whole_rows
from pallas_kernels import tiles as tiling
from pallas_kernels.config import MIN_LANES, WARP
from pallas_kernels.cutoff import (
    TILE_BITS,
    cutoff_among_candidates,
    list_candidates,
    load_largest,
    may_list,
    merge,
    search,
)
from pallas_kernels.limits import Limits, RowLimits, array_limits, fixed_row_limits, maybe_on, row_limits, static_limits
from pallas_kernels.rows import MAX_INDEX, exp2_rate
from pallas_kernels.slices import MAX_CANDIDATES, Exchange, Kept, Scratch, Slice
from pallas_kernels.types import TILE

COMPILER_PARAMS = plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=scan.EXCHANGE_BYTES // 2)
"""Like `emit.COMPILER_PARAMS`, with memory for 8 sums instead of 16: four blocks then fit a multiprocessor."""

HELD_AT = MAX_CANDIDATES + WARP
"""Index of the uniforms in the shared float32 memory: after the list of candidates and the sums of tiles."""

LARGEST_TOP_K = 64
"""Largest top-k, if it is a number, for which lists pay."""

AT_ONCE = 4
"""Candidates that the loop of `_pick` reads at once."""


def supports(limits: Limits) -> bool:
    """Whether candidates may be listed, and not all rows are greedy.

    A top-k that is a number above `LARGEST_TOP_K` may overflow its lists; `sample.sample` does not read the row again.
    """
    can_draw = fixed_row_limits(limits).greedy is None
    return can_draw and may_list(maybe_on(limits)) and (static_limits(limits).top_k or 0) <= LARGEST_TOP_K


def sample(
    logits: Float[Array, "B V"], limits: Limits, noise: random.Noise
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples like `sample.sample`, with `limits` that `supports` accepts."""
    batch_size, vocab_size = logits.shape
    blocks = slices.num_blocks(batch_size, vocab_size)
    static, arrays = static_limits(limits), array_limits(limits, batch_size)
    results = jax.ShapeDtypeStruct((batch_size,), jnp.int32), jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    exchange = slices.exchange(batch_size, blocks)._replace(tokens=slices.token_lists(batch_size, blocks))
    flat = logits.reshape(-1)

    def locate(logits, shared, barrier):
        row, block = lax.axis_index("sequence"), lax.axis_index("block")
        return slices.locate_slice(logits, vocab_size, row, row, block, blocks, shared, barrier)

    def limits_of(part, arrays):
        return row_limits(static, arrays, part.row)

    def list_in(part, arrays, exchange, shared):
        list_candidates(part, limits_of(part, arrays)._replace(greedy=None), exchange, shared)

    def list_rows(inputs, exchange, shared):
        sync.start_dependent_launch()
        logits, arrays = inputs
        list_in(slices.load_slice(locate(logits, None, None)), arrays, exchange, shared)

    def sample_lists(
        inputs, lists, results, sums, round_sums, pending, row_tiles, scan_scratch, floats, integers, barrier
    ):
        shared, tile_sums, held = _memory(scan_scratch, floats, integers)
        noise, logits, arrays = inputs
        part = locate(logits, row_tiles, barrier)
        uniforms = scan.hold(held, random.emit_uniforms(noise, part.row))
        sync.wait_for_previous_launch()
        exchange = lists._replace(sums=round_sums)
        limits = limits_of(part, arrays)
        row_filters = limits._replace(greedy=None)
        tokens, normalizers = results

        # Only block 0 reads the lists; the other blocks wait until it has written `pending`.
        @pl.when(part.block == 0)
        def _():
            largest = load_largest(part, row_filters, exchange)[0]
            is_done = _draws(limits, largest) & merge(part, row_filters, exchange, shared, largest)
            pending[part.row] = 1 - is_done.astype(jnp.int32)

            @pl.when(is_done)
            def _():
                kept, normalizer = _decide(part, row_filters, shared, largest)
                normalizers[part.row] = normalizer
                tokens[part.row] = _pick(shared, kept, exp2_rate(limits.scale), uniforms)

        slices.sync_blocks(part.num_blocks, part.barrier)

        @pl.when(pending[part.row] > 0)
        def _():
            largest = load_largest(part, row_filters, exchange)[0]
            result = _search_whole(part, limits, largest, uniforms, sums, exchange, tile_sums, scan_scratch)

            @pl.when(part.block == 0)
            def _():
                tokens[part.row], normalizers[part.row] = result

    def sample(inputs, results, sums, exchange, row_tiles, scan_scratch, floats, integers, barrier):
        shared, tile_sums, held = _memory(scan_scratch, floats, integers)
        noise, logits, arrays = inputs
        part = locate(logits, row_tiles, barrier)
        loaded = slices.load_slice(part)
        # Computed while the loads of the logits are in flight.
        uniforms = scan.hold(held, random.emit_uniforms(noise, part.row))
        list_in(loaded, arrays, exchange, shared)
        slices.sync_blocks(part.num_blocks, part.barrier)
        limits = limits_of(part, arrays)
        result = _sample_row(part, limits, uniforms, sums, exchange, shared, tile_sums, scan_scratch)
        tokens, normalizers = results

        @pl.when(part.block == 0)
        def _():
            tokens[part.row], normalizers[part.row] = result

    sums = whole_rows.sums_types(batch_size, vocab_size)
    scratch = (
        slices.tiles_scratch(logits.dtype, vocab_size, blocks),
        plgpu.SMEM((TILE + config.THREADS,), jnp.float32),
        plgpu.SMEM((HELD_AT + scan.HELD + MIN_LANES,), jnp.float32),
        plgpu.SMEM((MAX_CANDIDATES + MIN_LANES,), jnp.int32),
        sync.cluster_scratch(),
    )
    on_clusters = functools.partial(
        plgpu.kernel,
        scratch_types=scratch,
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(blocks,),
        cluster_names=("block",),
        compiler_params=COMPILER_PARAMS,
    )
    # Only with a top-k that is a number are the lists short enough for one block.
    if not static.top_k or not config.lists_first(batch_size * blocks):
        return on_clusters(sample, out_type=(results, sums, exchange))((noise, flat, arrays))[0]
    (lists,) = plgpu.kernel(
        list_rows,
        out_type=(exchange._replace(sums=None),),
        scratch_types=(slices.scratch()._replace(numbers=plgpu.SMEM((MAX_CANDIDATES,), jnp.int32)),),
        grid=(batch_size, blocks),
        grid_names=("sequence", "block"),
        compiler_params=COMPILER_PARAMS,
    )((flat, arrays))
    pending = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    out_type = results, sums, exchange.sums, pending
    return on_clusters(sample_lists, out_type=out_type)((noise, flat, arrays), lists)[0]


class _Memory(NamedTuple):
    """Shared memory of a block: for lists, for sums of tiles, and for the uniforms."""

    shared: Scratch
    tile_sums: Any
    held: Any


def _memory(scan_scratch: Any, floats: Any, integers: Any) -> _Memory:
    """Divides shared memory, of which each allocation takes 1 kB or more. Vectors begin at multiples of 16 bytes.

    Lists use the memory of `scan.choose`, which is needed only after them; weights of candidates are written after the
    maxima of groups were read.
    """
    groups = scan_scratch.at[pl.ds(TILE, config.THREADS)]
    shared = Scratch(
        position_max=scan_scratch.at[pl.ds(0, TILE)],
        group_max=groups,
        bound=floats.at[pl.ds(HELD_AT + scan.HELD, 1)],
        listed=floats.at[pl.ds(0, MAX_CANDIDATES)],
        weights=groups,
        numbers=integers.at[pl.ds(0, MAX_CANDIDATES)],
        counts=integers.at[pl.ds(MAX_CANDIDATES, MIN_LANES)],
    )
    return _Memory(shared, floats.at[pl.ds(MAX_CANDIDATES, WARP)], floats.at[pl.ds(HELD_AT, scan.HELD)])


def _sample_row(
    part: Slice,
    limits: RowLimits,
    uniforms: list[jax.Array],
    sums: whole_rows.Sums,
    exchange: Exchange,
    shared: Scratch,
    tile_sums: Any,
    scan_scratch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Returns the token, which only block 0 is sure to have, and the logsumexp. The candidates are listed."""
    filters = limits._replace(greedy=None)
    largest = load_largest(part, filters, exchange)[0]

    def pick():
        kept, normalizer = _decide(part, filters, shared, largest)

        def choose():
            return _pick(shared, kept, exp2_rate(limits.scale), uniforms)

        return lax.cond(part.block == 0, choose, lambda: jnp.int32(0)), normalizer

    def search_whole():
        return _search_whole(part, limits, largest, uniforms, sums, exchange, tile_sums, scan_scratch)

    return lax.cond(_draws(limits, largest) & merge(part, filters, exchange, shared, largest), pick, search_whole)


def _draws(limits: RowLimits, largest: jax.Array) -> jax.Array:
    """Whether the token of a row is drawn: the row is neither degenerate nor greedy."""
    finite = jnp.abs(largest) < jnp.inf
    return finite if limits.greedy is None else finite & ~limits.greedy


def _decide(part: Slice, filters: RowLimits, shared: Scratch, largest: jax.Array) -> tuple[Kept, jax.Array]:
    """Finds the cutoff among the merged candidates; also returns the logsumexp."""
    kept = cutoff_among_candidates(filters, shared, largest, exp2_rate(filters.scale), part.vocab_size)
    return kept, (largest if filters.scale is None else largest * filters.scale) + jnp.log(kept.total)


def _search_whole(
    part: Slice,
    limits: RowLimits,
    largest: jax.Array,
    uniforms: list[jax.Array],
    sums: whole_rows.Sums,
    exchange: Exchange,
    tile_sums: Any,
    scan_scratch: Any,
) -> tuple[jax.Array, jax.Array]:
    """Like `_sample_row`, of a row that its lists do not decide: the blocks read it again, and search it together."""
    slices.copy_to_shared(part)
    kept = lax.cond(
        _draws(limits, largest),
        lambda: search(part, limits._replace(greedy=None), exchange, largest),
        lambda: Kept(largest, jnp.float32(-jnp.inf), jnp.float32(jnp.nan), None),
    )
    return whole_rows.sample_shared(part, limits, kept, uniforms, sums, tile_sums, scan_scratch)


def _pick(shared: Scratch, kept: Kept, rate: Any, uniforms: list[jax.Array]) -> jax.Array:
    """Picks a tile by the first uniform, and a token in it by the second, among the merged candidates."""
    layout = tiling.lane_layout(MAX_CANDIDATES)
    count = shared.counts[candidates.COUNT]
    lane = tiling.lane_index(MAX_CANDIDATES)
    # Shared memory -> registers: [MAX_CANDIDATES].
    x, token = (plgpu.load(ref, layout=layout) for ref in (shared.listed, shared.numbers))
    token = jnp.where(lane < count, token, MAX_INDEX)
    weight = jnp.where((lane < count) & (x >= kept.cutoff), jnp.exp2((x - kept.largest) * rate), 0.0)
    shared.weights[...] = weight
    tile = token >> TILE_BITS

    # For each candidate: the weights of all tiles up to its own, of its tile, and of its tile up to its token. Weights
    # beyond the last candidate are 0.
    def add(i, carry):
        before, same, within, total = carry
        for j in range(AT_ONCE):
            other, other_weight = shared.numbers[i * AT_ONCE + j], shared.weights[i * AT_ONCE + j]
            other_tile = other >> TILE_BITS
            before = before + jnp.where(other_tile <= tile, other_weight, 0.0)
            in_same = jnp.where(other_tile == tile, other_weight, 0.0)
            same = same + in_same
            within = within + jnp.where(other <= token, in_same, 0.0)
            total = total + other_weight
        return before, same, within, total

    zero = plgpu.layout_cast(jnp.zeros((MAX_CANDIDATES,), jnp.float32), layout)
    rounds = (count + AT_ONCE - 1) // AT_ONCE
    before, same, within, total = lax.fori_loop(0, rounds, add, (zero, zero, zero, jnp.float32(0)))
    number = _first_beyond(tile, weight > 0, before > uniforms[0] * total)
    return _first_beyond(token, (weight > 0) & (tile == number), within > uniforms[1] * same)


def _first_beyond(numbers: jax.Array, positive: jax.Array, beyond: jax.Array) -> jax.Array:
    """The smallest positive number beyond a bound; if rounding leaves none, the largest positive one."""
    # The largest rank is that of the first number beyond the bound or, if there is none, of the last number.
    rank = jnp.where(beyond, MAX_INDEX - numbers, numbers)
    best = jnp.max(jnp.where(positive, rank, 0))
    return jnp.where(best > MAX_INDEX // 2, MAX_INDEX - best, best)
