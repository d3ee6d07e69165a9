"""The token rule under top-k, top-p or min-p, in two launches.

Launch `token_cutoffs`: clusters find each row's cutoff, its largest logit and the sum of what is kept, as in `cutoff`.
One more cluster per sequence looks up the logits of the drafted tokens. Where the draft has normalizers its rows are
searched too, because a residual needs their cutoffs; its normalizers then replace their sums.

Launch `token_emit`, as in `token`: it has each row's normalizer already, and may start before the first launch ends.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import cutoffs, reading, rows, slices, tiles, token, token_rule
from pallas_kernels.limits import Limits, RowLimits, arrays_of, maybe_on, numbers_of, row_limits
from pallas_kernels.random import Draws
from pallas_kernels.types import LARGEST_LOG_NORMALIZER, Filter, Verification


class RowFacts(NamedTuple):
    """One value per row, each `[B, lanes]` in global memory with one row per lane.

    Attributes:
      cutoff: The smallest kept logit.
      offset, log_sum: The normalizer; see `token_rule.RowMass`.
      first: First index of the largest logit of a greedy row; None if no row may be greedy.
    """

    cutoff: Any
    offset: Any
    log_sum: Any
    first: Any


class Read(NamedTuple):
    """The outputs of the first launch.

    Attributes:
      target: Of the target's rows.
      draft: Of the draft's; None if they are not searched.
      filters: Scale and greedy of each sequence where they are arrays, of the target and of the draft.
      facts: One value of each kind per drafted token; see `reading.Facts`.
      counters: Zeros, `[B]`, for `sync.arrive`.
    """

    target: RowFacts
    draft: RowFacts | None
    filters: tuple[Filter, Filter]
    facts: reading.Facts
    counters: Any


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_limits: Limits,
    draft_logits: Float[Array, "B K V"] | None,
    draft_limits: Limits,
    log_normalizers: Float[Array, "B K"] | None,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
    *,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the token rule, as `token.verify_token` does, filters included.

    V is such that `slices.supports(V)`. With `log_normalizers` the draft's rows are read for their cutoffs, unless it
    is certain that no filter of the draft is on.
    """
    batch_size, num_rows, vocab_size = target_logits.shape
    config = config or sizes.token_config(batch_size, vocab_size)
    searches_draft = draft_logits is not None and (log_normalizers is None or not _keeps_all(draft_limits))
    limits = target_limits, draft_limits
    inputs = rows.make_inputs(
        target_logits,
        Filter(),
        draft_logits,
        Filter(),
        None if searches_draft else log_normalizers,
        draft_tokens,
        draws,
    )
    searched = [cutoffs.Rows(target_logits, target_limits)]
    if searches_draft:
        assert draft_logits is not None
        searched.append(cutoffs.Rows(draft_logits, draft_limits))
    normalizers = log_normalizers.astype(jnp.float32) if searches_draft and log_normalizers is not None else None
    read = _read(inputs, searched, limits, normalizers, batch_size, num_rows, vocab_size)

    def decide(inputs, read):
        sequence = _filtered(_sequence(inputs, limits, vocab_size), read)
        return sequence, *_decide_all(sequence, read)

    return token.emit_after(read, inputs, decide, lambda read: None, batch_size, num_rows, vocab_size, config)


def _keeps_all(limits: Limits) -> bool:
    """Whether it is certain that no filter is on, nor a temperature that only the program's run will know."""
    return numbers_of(limits).temperature is not None and maybe_on(limits)[1:] == (None, None, None)


def _static(limits: Limits) -> RowLimits:
    """The parameters that are numbers."""
    numbers = numbers_of(limits)
    return row_limits(numbers, Limits(*[None] * len(numbers)), 0)


def _filter_types(limits: Limits, batch_size: int) -> Filter:
    """Types of the scale and of greedy, where a sequence's are written by the first launch."""

    def type_if(written, dtype) -> Any:
        return jax.ShapeDtypeStruct((batch_size,), dtype) if written else None

    by_array = numbers_of(limits).temperature is None
    greedy = by_array or _static(limits).greedy
    return Filter(scale=type_if(by_array, jnp.float32), greedy=type_if(greedy, jnp.int32))


def _sequence(inputs: rows.Inputs, limits: tuple[Limits, Limits], vocab_size: int) -> rows.Sequence:
    """The sequence of this block, with the scales that are numbers."""
    sequence = rows.sequence_view(inputs, vocab_size)
    target, draft = (
        model and model._replace(filter=Filter(_static(one).scale))
        for model, one in zip((sequence.target, sequence.draft), limits, strict=True)
    )
    return sequence._replace(target=target, draft=draft)


def _read(
    inputs: rows.Inputs,
    searched: list[cutoffs.Rows],
    limits: tuple[Limits, Limits],
    normalizers: Any,
    batch_size: int,
    num_rows: int,
    vocab_size: int,
) -> Read:
    """Launches `token_cutoffs`."""
    num_draft = num_rows - 1
    width = batch_size, sizes.row_lanes(num_rows)
    lanes, number = jax.ShapeDtypeStruct(width, jnp.float32), jax.ShapeDtypeStruct(width, jnp.int32)
    filters = tuple(_filter_types(one, batch_size) for one in limits)

    def row_facts(filter):
        return RowFacts(lanes, lanes, lanes, None if filter.greedy is None else number)

    out_type = Read(
        target=row_facts(filters[0]),
        draft=row_facts(filters[1]) if len(searched) > 1 else None,
        filters=(filters[0], filters[1]),
        facts=reading.facts_types(batch_size, num_rows),
        counters=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    )
    arrays = tuple(arrays_of(one, batch_size) for one in limits)

    def write(i, sequence, row, found, arguments, out):
        _, _, normalizers = arguments
        offset, log_sum = found.largest, jnp.log(found.total)
        if i == 1 and normalizers is not None:
            given = normalizers[sequence, row]
            usable = jnp.abs(given) <= LARGEST_LOG_NORMALIZER
            offset, log_sum = jnp.where(usable, 0.0, offset), jnp.where(usable, given, log_sum)
        facts = out.draft if i == 1 else out.target
        for ref, value in zip(facts, (found.cutoff, offset, log_sum, found.first), strict=True):
            if ref is not None:
                ref[sequence, row] = value

    def run(sequence, block, num_blocks, arguments, out):
        inputs, arrays, _ = arguments
        view = _sequence(inputs, limits, vocab_size)
        for i in range(-(-num_draft // num_blocks)):
            row = block + i * num_blocks
            pl.when(row < num_draft)(functools.partial(reading.look_up, view, row, out.facts))

        @pl.when(block == 0)
        def _():
            out.counters[sequence] = 0
            for one, array, filter in zip(limits, arrays, out.filters, strict=True):
                limit = row_limits(numbers_of(one), array, sequence)
                if filter.scale is not None:
                    filter.scale[sequence] = limit.scale
                if filter.greedy is not None:
                    filter.greedy[sequence] = jnp.where(jnp.bool_(limit.greedy), 1, 0)

    def needs(sequence, i, row, arguments):
        del sequence
        return reading.is_drafted(rows.sequence_view(arguments[0], vocab_size), row + i)

    blocks = slices.num_blocks(batch_size * num_rows, vocab_size)
    # If all blocks run concurrently, reading rows without a draft costs less than waiting for the draft tokens.
    reads_all = batch_size * num_rows * len(searched) * blocks <= sizes.EMITTING_BLOCKS * sizes.num_multiprocessors()
    beside = cutoffs.Beside(run, None if reads_all or num_draft == 0 else needs)
    return cutoffs.launch("token_cutoffs", searched, out_type, write, (inputs, arrays, normalizers), beside)


def _filtered(sequence: rows.Sequence, read: Read) -> rows.Sequence:
    """The sequence with the filters from the first launch."""

    def filtered(model, facts, filter):
        scale = model.filter.scale if filter.scale is None else filter.scale
        return model._replace(filter=Filter(scale, None if facts is None else facts.cutoff, filter.greedy))

    target = filtered(sequence.target, read.target, read.filters[0])
    draft = sequence.draft and filtered(sequence.draft, read.draft, read.filters[1])
    return sequence._replace(target=target, draft=draft)


def _decide_all(sequence: rows.Sequence, read: Read) -> tuple[token_rule.Tables, jax.Array]:
    """The tables' values of all rows of a sequence, one row per lane, and which drafts are accepted."""

    def load(facts):
        return RowFacts(*(None if ref is None else tiles.load_lanes(ref, (sequence.number,)) for ref in facts))

    def cut(logit, row):
        return jnp.where(logit >= row.cutoff, logit, -jnp.inf)

    p, q = load(read.target), None if read.draft is None else load(read.draft)
    facts = token.load_facts(sequence, read.facts)
    facts = facts._replace(target_logit=cut(facts.target_logit, p))
    if q is not None:
        facts = facts._replace(draft_logit=cut(facts.draft_logit, q))

    def target_mass(is_greedy):
        if is_greedy is None:
            return token_rule.RowMass(p.offset, p.log_sum)
        return token_rule.greedy_mass(p.offset, p.log_sum, p.first, is_greedy)

    def draft_mass():
        if q is None:
            return token_rule.RowMass(facts.q_offset, facts.q_log_sum)
        return token_rule.RowMass(q.offset, q.log_sum)

    return token_rule.decide(sequence, facts, target_mass, draft_mass, functools.partial(token.per_row, sequence))
