"""Launches that find the cutoffs of many rows, one cluster of blocks per row.

Few rows take one launch, in which each cluster lists its row's candidates, meets, and decides. Where there are more
rows than the multiprocessors hold at once, a block that waits for its cluster keeps another from loading: one launch
lists candidates, and nobody waits; the next decides, mostly in the first block of a cluster alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import config, emit, slices, sync
from pallas_kernels.cutoff import decide, find, list_candidates, may_list, surely_fit
from pallas_kernels.limits import Limits, arrays_of, maybe_on, numbers_of, row_limits
from pallas_kernels.slices import LISTED, Exchange, Kept, Listing

JOINED = 4 * LISTED
"""Candidates of all blocks that one block takes in without asking the others."""


class Rows(NamedTuple):
    """Logits and their sampling parameters.

    Attributes:
      logits: `[B, R, V]`.
      limits: Numbers, or arrays `[B]`.
    """

    logits: Float[Array, "B R V"]
    limits: Limits


class Beside(NamedTuple):
    """Work of one more cluster per sequence.

    Attributes:
      run: `run(sequence, block, num_blocks, arguments, outputs)`. None: there is no such cluster.
      needs: `needs(sequence, i, row, arguments)`, whether a row of the i-th input is searched. None: all are.
    """

    run: Callable[[Any, Any, int, Any, Any], None] | None
    needs: Callable[[Any, int, Any, Any], jax.Array] | None = None


def cutoffs(*inputs: Rows) -> list[Kept]:
    """Finds what the filters keep of each row of all `inputs`, on a GPU, Hopper or newer.

    Top-k, then top-p, then min-p, ties at the cutoff kept, never above the largest logit. Logits are bfloat16, float16
    or float32, V from `TILE` on and such that `slices.supports(V)`; arithmetic is float32 in an order that depends on V
    and on the number of rows.

    Returns:
      A `Kept` of arrays `[B, R]` for each of `inputs`.
    """
    each = [jax.ShapeDtypeStruct(one.logits.shape[:2], jnp.float32) for one in inputs]
    types = [Kept(one, one, one, None) for one in each]

    def write(i, sequence, row, found, arguments, out):
        del arguments
        for ref, value in zip(out[i], found, strict=True):
            if ref is not None:
                ref[sequence, row] = value

    return launch("cutoffs", inputs, types, write)


class _Plan(NamedTuple):
    """The rows of a launch and their share of blocks: of `count[i]` rows per sequence in the i-th input."""

    counts: list[int]
    numbers: list[Limits]
    dtypes: list[Any]
    batch_size: int
    vocab_size: int
    blocks: int
    beside: Beside | None


def launch(
    name: str,
    inputs: Sequence[Rows],
    out_type: Any,
    write_fn: Callable[[int, Any, Any, Kept, Any, Any], None],
    arguments: Any = (),
    beside: Beside | None = None,
) -> Any:
    """Searches all rows; `write_fn(i, sequence, row, found, arguments, outputs)` stores a result.

    Args:
      name: Name of the launch in a profile. Candidates are listed in one of their own, `list_candidates`, if rows are
        many.
      inputs: The rows.
      out_type: Types of the outputs.
      write_fn: Runs in one block for each row, of the i-th input.
      arguments: More arrays, for `write_fn` and `beside`.
      beside: See `Beside`.

    Returns:
      The outputs.
    """
    batch_size, _, vocab_size = inputs[0].logits.shape
    counts = [one.logits.shape[1] for one in inputs]
    num_rows = batch_size * sum(counts)
    blocks = slices.num_blocks(num_rows, vocab_size)
    dtypes = [jnp.dtype(one.logits.dtype) for one in inputs]
    plan = _Plan(counts, [numbers_of(one.limits) for one in inputs], dtypes, batch_size, vocab_size, blocks, beside)
    given = [one.logits.reshape(-1) for one in inputs], [arrays_of(one.limits, batch_size) for one in inputs], arguments

    def write(at, part, found, arguments, out):
        i, sequence, row = at
        pl.when(part.block == 0)(lambda: write_fn(i, sequence, row, found, arguments, out[0]))

    def find_row(at, part, limits, shared, listing, arguments, out):
        del listing
        found = find(slices.load(part), limits, out[1], shared)
        write(at, part, found, arguments, out)

    def list_row(at, part, limits, shared, listing, arguments, out):
        del at, listing, arguments
        list_candidates(slices.load(part), limits, out, shared)

    def decide_row(at, part, limits, shared, listing, arguments, out):
        @pl.when((part.block == 0) | ~surely_fit(part, limits, listing, JOINED))
        def _():
            found = decide(part, limits, Exchange(listing, out[1]), shared, lambda: slices.load(part))
            write(at, part, found, arguments, out)

    held_at_once = config.EMITTING_BLOCKS * config.num_multiprocessors()
    if num_rows * blocks < 2 * held_at_once or not all(may_list(maybe_on(one.limits)) for one in inputs):
        return _launch(name, plan, given, None, (out_type, slices.exchange(num_rows, blocks)), find_row, LISTED)[0]
    listing = _launch(
        "list_candidates",
        plan._replace(beside=beside and beside._replace(run=None)),
        given,
        None,
        slices.listing_types(num_rows, blocks),
        list_row,
        LISTED,
    )
    return _launch(name, plan, given, listing, (out_type, slices.sums_type(num_rows)), decide_row, JOINED)[0]


def _launch(
    name: str, plan: _Plan, given: Any, listing: Listing | None, out_type: Any, row_fn: Callable, capacity: int
) -> Any:
    """One launch: `row_fn((i, sequence, row), part, limits, shared, listing, arguments, outputs)` for each row.

    `listing` is the output of the launch before, if any; `capacity` is that of a block's list of candidates.
    """
    searched = sum(plan.counts)
    dtypes = sorted(set(plan.dtypes), key=str)
    tiles = [slices.tiles_scratch(dtype, plan.vocab_size, plan.blocks) for dtype in dtypes]
    beside_fn = None if plan.beside is None else plan.beside.run

    def kernel(given, listing, out, shared, tiles, barrier):
        sync.start_dependent_launch()
        if listing is not None:
            sync.wait_for_previous_launch()
        logits, arrays, arguments = given
        sequence, slot, block = (lax.axis_index(name) for name in ("sequence", "row", "block"))

        def run(i, row):
            part = slices.locate(
                logits[i],
                plan.vocab_size,
                sequence * plan.counts[i] + row,
                sequence * searched + slot,
                block,
                plan.blocks,
                tiles[dtypes.index(plan.dtypes[i])],
                barrier,
            )
            limits = row_limits(plan.numbers[i], arrays[i], sequence)
            row_fn((i, sequence, row), part, limits, shared, listing, arguments, out)

        first = 0
        for i, count in enumerate(plan.counts):
            row, wanted = slot - first, (slot >= first) & (slot < first + count)
            if plan.beside is not None and plan.beside.needs is not None:
                wanted = wanted & plan.beside.needs(sequence, i, jnp.clip(row, 0, count - 1), arguments)
            pl.when(wanted)(functools.partial(run, i, row))
            first += count
        if beside_fn is not None:
            pl.when(slot == searched)(functools.partial(beside_fn, sequence, block, plan.blocks, arguments, out[0]))

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=(out_type,),
        scratch_types=(slices.scratch(capacity), tiles, sync.cluster_scratch()),
        grid=(plan.batch_size, searched + (beside_fn is not None)),
        grid_names=("sequence", "row"),
        cluster=(plan.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(given, listing)[0]
