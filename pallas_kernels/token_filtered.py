"""The token rule with top-k, top-p or min-p, in two launches.

Launch `token_cutoffs`, grid (sequence, row), one cluster of blocks per row: finds the cutoff of each row, its largest
logit, and the sum of the kept weights (`cutoff`). One additional cluster per sequence looks up the logits of the
drafted tokens. Rows of the draft are read even if `log_normalizers` are passed, because the residual max(p - q, 0)
needs their cutoffs. Usable normalizers then replace the sums of these rows.

Launch `token_emit`, as in `token`: accepts drafts and emits the last token. It reads the normalizers of all rows from
the first launch. It may start before that launch has ended, and waits for its end before it reads its outputs.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import cutoffs, emit, reading, rows, slices, tiles, token, token_rule
from pallas_kernels.limits import Limits, array_limits, fixed_row_limits, keeps_all, row_limits, static_limits
from pallas_kernels.random import ROUND_PARTS, Draws
from pallas_kernels.types import LARGEST_LOG_NORMALIZER, Filter, Verification


class RowFacts(NamedTuple):
    """One value per row, each `[B, lanes]` in global memory with one row per lane.

    Attributes:
      cutoff: The smallest kept logit.
      offset, log_sum: The normalizer; see `token_rule.RowMass`.
      first: First index of the largest logit; set in greedy rows only. None if no row can be greedy.
    """

    cutoff: Any
    offset: Any
    log_sum: Any
    first: Any


class Read(NamedTuple):
    """The outputs of the first launch.

    Attributes:
      target: Values of the target's rows.
      draft: Values of the draft's rows; None if these rows are not read.
      filters: Scale `[B]` and greedy `[B]` of the target and of the draft; a field is None if it is known at compile
        time.
      facts: One value of each kind per drafted token; see `reading.Facts`.
      uniforms: The uniforms of the last token; see `reading.uniforms_type`.
      counters: Zeros, `[B]`, for `sync.arrive`.
      trials: Outputs for the block rule; None in other rules.
    """

    target: RowFacts
    draft: RowFacts | None
    filters: tuple[Filter, Filter]
    facts: reading.Facts
    uniforms: Any
    counters: Any
    trials: reading.Trials | None


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
    """Returns the verification by the token rule like `token.verify_token`, but finds the cutoffs of the filters too.

    V satisfies `slices.supports(V)`. With `log_normalizers` the draft's rows are still read for their cutoffs, unless
    all filters of the draft are off at compile time.
    """
    config = config or sizes.filtered_token_config(target_logits.shape[0], target_logits.shape[2])
    models = target_logits, target_limits, draft_logits, draft_limits
    return filter_then_emit(token.emit_after, *models, log_normalizers, draft_tokens, draws, config)


def filter_then_emit(
    emit_fn: token.EmitFn,
    target_logits: Float[Array, "B K1 V"],
    target_limits: Limits,
    draft_logits: Float[Array, "B K V"] | None,
    draft_limits: Limits,
    log_normalizers: Float[Array, "B K"] | None,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
    config: sizes.Config,
    *,
    trial: bool = False,
) -> Verification:
    """Launches `token_cutoffs`, then the second launch of a rule; `trial` writes `Read.trials`."""
    batch_size, num_rows, vocab_size = target_logits.shape
    # With temperatures in an array too, because `reading.look_up` needs the scale before it has been computed.
    searches_draft = draft_logits is not None and (log_normalizers is None or not keeps_all(draft_limits))
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
    trials = reading.trials_types(inputs, batch_size, num_rows, vocab_size, False) if trial else None
    read = _read(inputs, searched, limits, normalizers, batch_size, num_rows, vocab_size, trials)

    def decide(inputs, read):
        sequence = _add_filters(_sequence(inputs, limits, vocab_size), read)
        return sequence, *_decide_all(sequence, read)

    out = emit_fn(read, inputs, decide, lambda read: None, batch_size, num_rows, vocab_size, config)
    return emit.without_padding(out)


def _filter_types(limits: Limits, batch_size: int) -> Filter:
    """Types of the fields of `Filter` that the first launch writes; None for the others."""

    def type_if(written, dtype) -> Any:
        return jax.ShapeDtypeStruct((batch_size,), dtype) if written else None

    is_array = static_limits(limits).temperature is None
    greedy = is_array or fixed_row_limits(limits).greedy
    return Filter(scale=type_if(is_array, jnp.float32), greedy=type_if(greedy, jnp.int32))


def _sequence(inputs: rows.Inputs, limits: tuple[Limits, Limits], vocab_size: int, number: Any = None) -> rows.Sequence:
    """`rows.sequence_view` with scales from temperatures that are numbers; a scale from an array is unset."""
    sequence = rows.sequence_view(inputs, vocab_size, number)
    target, draft = (
        model and model._replace(filter=Filter(fixed_row_limits(model_limits).scale))
        for model, model_limits in zip((sequence.target, sequence.draft), limits, strict=True)
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
    trials: reading.Trials | None,
) -> Read:
    """Launches `token_cutoffs`."""
    num_draft = num_rows - 1
    width = batch_size, sizes.row_lanes(num_rows)
    floats, ints = jax.ShapeDtypeStruct(width, jnp.float32), jax.ShapeDtypeStruct(width, jnp.int32)
    filters = tuple(_filter_types(model_limits, batch_size) for model_limits in limits)

    def row_facts(filter):
        return RowFacts(floats, floats, floats, None if filter.greedy is None else ints)

    out_type = Read(
        target=row_facts(filters[0]),
        draft=row_facts(filters[1]) if len(searched) > 1 else None,
        filters=(filters[0], filters[1]),
        facts=reading.facts_types(batch_size, num_rows),
        uniforms=reading.uniforms_type(inputs, batch_size),
        counters=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        trials=trials,
    )
    arrays = tuple(array_limits(model_limits, batch_size) for model_limits in limits)

    def write_row(i, sequence, row, kept, arguments, out):
        _, _, normalizers = arguments
        offset, log_sum = kept.largest, jnp.log(kept.total)
        if i == 1 and normalizers is not None:
            log_normalizer = normalizers[sequence, row]
            usable = jnp.abs(log_normalizer) <= LARGEST_LOG_NORMALIZER
            offset, log_sum = jnp.where(usable, 0.0, offset), jnp.where(usable, log_normalizer, log_sum)
        facts = out.draft if i == 1 else out.target
        for ref, value in zip(facts, (kept.cutoff, offset, log_sum, kept.first), strict=True):
            if ref is not None:
                ref[sequence, row] = value

    def look_up_drafts(sequence, block, num_blocks, arguments, out):
        inputs, arrays, _ = arguments
        view = _sequence(inputs, limits, vocab_size, sequence)
        for i in range(-(-num_draft // num_blocks)):
            row = block + i * num_blocks
            pl.when(row < num_draft)(functools.partial(reading.look_up, view, row, out.facts))

        if out.trials is not None:
            for part in range(ROUND_PARTS):
                writes = block == min(part + 1, num_blocks - 1)
                pl.when(writes)(functools.partial(reading.write_rounds, view, jnp.int32(part), out.trials))

        @pl.when(block == 0)
        def _():
            reading.write_uniforms(view, out.uniforms)
            out.counters[sequence] = 0
            for model_limits, array, filter in zip(limits, arrays, out.filters, strict=True):
                limit = row_limits(static_limits(model_limits), array, sequence)
                if filter.scale is not None:
                    filter.scale[sequence] = limit.scale
                if filter.greedy is not None:
                    filter.greedy[sequence] = jnp.where(jnp.bool_(limit.greedy), 1, 0)

    def needs_row(sequence, i, row, arguments):
        # Row r of the target (i = 0) follows r drafts; row r of the draft (i = 1) is needed if position r has a draft.
        return reading.is_drafted(rows.sequence_view(arguments[0], vocab_size, sequence), row + i)

    num_searched = batch_size * (num_rows + (len(searched) - 1) * num_draft)
    blocks = slices.num_blocks(num_searched, vocab_size)
    # If all blocks run concurrently, reading rows without a draft costs less than waiting for the draft tokens.
    reads_all = num_searched * blocks <= sizes.EMITTING_BLOCKS * sizes.num_multiprocessors()
    extra = cutoffs.Extra(look_up_drafts, None if reads_all or num_draft == 0 else needs_row)
    return cutoffs.launch("token_cutoffs", searched, out_type, write_row, (inputs, arrays, normalizers), extra)


def _add_filters(sequence: rows.Sequence, read: Read) -> rows.Sequence:
    """Adds the outputs of the first launch to the filters of a sequence: cutoffs, and scales and greedy from arrays."""

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

    def apply_cutoff(logit, row):
        return jnp.where(logit >= row.cutoff, logit, -jnp.inf)

    p, q = load(read.target), None if read.draft is None else load(read.draft)
    facts = token.load_facts(sequence, read.facts)
    facts = facts._replace(target_logit=apply_cutoff(facts.target_logit, p))
    if q is not None:
        facts = facts._replace(draft_logit=apply_cutoff(facts.draft_logit, q))

    def target_mass(is_greedy):
        if is_greedy is None:
            return token_rule.RowMass(p.offset, p.log_sum)
        return token_rule.greedy_mass(p.offset, p.log_sum, p.first, is_greedy)

    def draft_mass():
        if q is None:
            return token_rule.RowMass(facts.q_offset, facts.q_log_sum)
        return token_rule.RowMass(q.offset, q.log_sum)

    return token_rule.decide(sequence, facts, target_mass, draft_mass, functools.partial(token.per_row, sequence))
