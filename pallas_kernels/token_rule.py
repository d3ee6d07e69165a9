"""Parts of the token rule's and the block rule's kernels: values per row, the token rule's decisions, and weights.

A per-row value is a vector with one row per lane if all rows are processed at once, and a scalar for a single row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, emit, reading, rows, tiles


class RowMass(NamedTuple):
    """Normalizers of rows, not finite for degenerate rows.

    Attributes:
      offset: Subtracted from the logits.
      log_sum: Logsumexp of `(logit - offset) * scale` over the kept logits.
      certain: The token of probability 1 in a greedy row, -1 in others. None if no row is greedy.
    """

    offset: jax.Array
    log_sum: jax.Array
    certain: jax.Array | None = None


class Tables(NamedTuple):
    """Values of every row in shared memory, each `[lanes]`: written by lane, read by the row's number."""

    token: Any
    p_offset: Any
    p_log_sum: Any
    p_certain: Any
    q_offset: Any
    q_log_sum: Any
    log_p: Any
    log_q: Any
    accept_prob: Any


class Stop(NamedTuple):
    """The row at which a sequence stops. `p_certain` and `q_certain`: the token of probability 1, or -1.

    The weights of a rejected draft's row are max(P p - q, 0). P is P_i of the block rule, and 1 in the token rule.
    """

    num_accepted: jax.Array  # index of the row
    rejecting: jax.Array  # its draft was rejected by min(1, p/q)
    distrusted: jax.Array  # its draft was rejected because q is 0 or degenerate
    degenerate: jax.Array
    p_offset: jax.Array
    p_log_sum: jax.Array
    p_certain: jax.Array
    q_offset: jax.Array
    q_log_sum: jax.Array
    q_certain: jax.Array
    log_joint: jax.Array | None = None  # log P; None: 0


def tables_scratch(num_rows: int) -> Tables:
    """Shared memory for the tables."""
    shape = (config.row_lanes(num_rows),)
    floats = {name: plgpu.SMEM(shape, jnp.float32) for name in Tables._fields}
    return Tables(**floats | {name: plgpu.SMEM(shape, jnp.int32) for name in ("token", "p_certain")})


def greedy_mass(top: jax.Array, log_sum: jax.Array, first: jax.Array, is_greedy: jax.Array) -> RowMass:
    """Normalizers of rows; a greedy row has probability 1 at its first largest logit, if that is finite."""
    certain = jnp.where(is_greedy & rows.is_finite(top), first, -1)
    return RowMass(top, jnp.where(is_greedy, 0.0, log_sum), certain)


def row_mass(model: rows.Rows, stats: reading.ChunkStats, row: Any, is_greedy: jax.Array | None) -> RowMass:
    """The normalizer of one row, from statistics with one chunk per lane."""
    index = model.sequence, row
    tops, totals = reading.load_row_stats(model, stats, row)
    top = jnp.max(tops)
    log_sum = jnp.log(jnp.sum(totals * jnp.exp2((tops - top) * rows.exp2_rate(rows.scale_of(model)))))
    if is_greedy is None:
        return RowMass(top, log_sum)
    indices = jnp.where(tops == top, tiles.load_lanes(stats.first, index), rows.MAX_INDEX)
    return greedy_mass(top, log_sum, jnp.min(indices), is_greedy)


def decide(
    sequence: rows.Sequence,
    facts: reading.Facts,
    target_mass_fn: Callable[[jax.Array | None], RowMass],
    draft_mass_fn: Callable[[], RowMass],
    per_row: Callable[[jax.Array], jax.Array],
) -> tuple[Tables, jax.Array]:
    """Returns the values of `Tables`, and which drafts are accepted. Values of unread rows are undefined.

    Args:
      sequence: The sequence.
      facts: Values of the drafted tokens; the token is -1 in the bonus row.
      target_mass_fn: Returns the target's normalizers, given which rows are greedy (None: none).
      draft_mass_fn: Returns the draft's normalizers, computed as if no row were greedy.
      per_row: Broadcasts a flag of the sequence to one per row.
    """

    def is_greedy(greedy):
        return per_row(greedy[sequence.number] > 0)

    greedy_target = sequence.target.filter.greedy
    p = target_mass_fn(None if greedy_target is None else is_greedy(greedy_target))
    values = Tables(facts.token, p.offset, p.log_sum, p.certain, None, None, None, None, None)
    if sequence.num_draft == 0:
        return values, facts.token >= 0
    log_p = rows.log_prob(sequence.target, facts.target_logit, p.offset, p.log_sum)
    if p.certain is not None:
        log_p = jnp.where(p.certain < 0, log_p, jnp.where(p.certain == facts.token, 0.0, -jnp.inf))
    log_q = jnp.zeros_like(log_p)
    if sequence.draft is not None:
        q = draft_mass_fn()
        log_q = rows.log_prob(sequence.draft, facts.draft_logit, q.offset, q.log_sum)
        values = values._replace(q_offset=q.offset, q_log_sum=q.log_sum)
        if sequence.draft.filter.greedy is not None:
            # A greedy draft has q = 1 at its token, unless its row is degenerate.
            regular = rows.is_finite(q.offset + q.log_sum)
            log_q = jnp.where(is_greedy(sequence.draft.filter.greedy) & regular, 0.0, log_q)
    # A token of q = 0, outside the vocabulary or from a degenerate row is rejected, and the residual is p.
    trusted = (facts.token >= 0) & (facts.token < sequence.target.vocab_size) & (log_q > -jnp.inf)
    usable = trusted & (log_p > -jnp.inf)
    log_ratio = jnp.where(usable, log_p - log_q, -jnp.inf)
    accepted = usable & (jnp.log(facts.accept) < log_ratio)
    log_q = jnp.where(trusted, log_q, -jnp.inf)
    accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0))
    return values._replace(log_p=log_p, log_q=log_q, accept_prob=accept_prob), accepted


def write_tables(tables: Tables, index: Any, values: Tables):
    """Writes values to the tables, of all rows (`index` is `slice(None)`) or of one."""
    for ref, value in zip(tables, values, strict=True):
        if value is not None:
            # Registers -> shared memory: [lanes], or one element.
            ref[index] = value


def stop_at(sequence: rows.Sequence, tables: Tables, row: jax.Array) -> Stop:
    """Reads the `Stop` of a row from the tables."""
    none, zero = jnp.int32(-1), jnp.float32(0)
    offset, log_sum = tables.p_offset[row], tables.p_log_sum[row]
    greedy_target = sequence.target.filter.greedy
    certain = none if greedy_target is None else tables.p_certain[row]
    rejecting = distrusted = jnp.bool_(False)
    q_offset, q_log_sum, q_certain = zero, zero, none
    if sequence.num_draft:
        drafted, trusted = tables.token[row], tables.log_q[row] > -jnp.inf
        stopped = drafted >= 0
        rejecting, distrusted = stopped & trusted, stopped & ~trusted
        if sequence.draft is None:
            q_certain = drafted
        else:
            q_offset, q_log_sum = tables.q_offset[row], tables.q_log_sum[row]
            if sequence.draft.filter.greedy is not None:
                q_certain = jnp.where(sequence.draft.filter.greedy[sequence.number] > 0, drafted, -1)
    degenerate = ~are_regular(sequence, offset, log_sum, certain)
    return Stop(row, rejecting, distrusted, degenerate, offset, log_sum, certain, q_offset, q_log_sum, q_certain)


def are_regular(sequence: rows.Sequence, p_offset: jax.Array, p_log_sum: jax.Array, p_certain: Any) -> jax.Array:
    """Whether target rows with these values of `Tables` have a distribution."""
    finite = rows.is_finite(p_offset + p_log_sum)
    if sequence.target.filter.greedy is None:
        return finite
    # Of greedy rows `p_certain` is -1 only if they are all -inf; of others always.
    none = jnp.where(sequence.target.filter.greedy[sequence.number] > 0, 0, -1)
    return finite & (p_certain >= none)


def target_weights(sequence: rows.Sequence, stop: Stop, logits: list[jax.Array], tile: tiles.Tile) -> jax.Array:
    """Weights `[TILE]` of the target's row: P p."""
    del tile
    log_sum = stop.p_log_sum if stop.log_joint is None else stop.p_log_sum - stop.log_joint
    return rows.prob(sequence.target, stop.num_accepted, logits[0], stop.p_offset, log_sum)


def residual_weights(sequence: rows.Sequence, stop: Stop, logits: list[jax.Array], tile: tiles.Tile) -> jax.Array:
    """Weights `[TILE]` of a row whose draft was rejected: max(P p - q, 0)."""
    subtracts = None
    if sequence.draft is None or sequence.draft.filter.greedy is not None:
        subtracts = stop.rejecting & (stop.q_certain < 0)
    return _subtract_draft(sequence, stop, logits, tile, subtracts)


def stop_weights(sequence: rows.Sequence, stop: Stop, logits: list[jax.Array], tile: tiles.Tile) -> jax.Array:
    """Weights `[TILE]` of any row: `residual_weights` if its draft was rejected, else `target_weights`."""
    if sequence.num_draft == 0:
        return target_weights(sequence, stop, logits, tile)
    return _subtract_draft(sequence, stop, logits, tile, stop.rejecting & (stop.q_certain < 0))


def _subtract_draft(sequence, stop, logits, tile, subtracts: jax.Array | None) -> jax.Array:
    """max(P p - q, 0), where q comes from the draft's logits if `subtracts` (None: True), and is 1 at `q_certain`."""
    weights, draft = target_weights(sequence, stop, logits, tile), sequence.draft
    if draft is not None:
        q = rows.prob(draft, sequence.draft_row(stop.num_accepted), logits[1], stop.q_offset, stop.q_log_sum)
        if subtracts is not None:
            # Every q is at most infinity and none is at most -1, so this keeps q or sets it to 0; NaN becomes 0.
            q = jnp.where(q <= jnp.where(subtracts, jnp.inf, -1.0), q, 0.0)
        weights = jnp.maximum(weights - q, 0.0)
    if draft is None or draft.filter.greedy is not None:
        # q is 1 at `q_certain`, so max(P p - q, 0) is 0 there.
        weights = jnp.where(tile.indices() != jnp.where(stop.rejecting, stop.q_certain, -1), weights, 0.0)
    return weights


def write_values(emission: emit.Emission, tables: Tables, stop: Stop, row: Any, accept_prob_fn: Callable = lambda x: x):
    """Writes the log-probability of an accepted draft, 0 after the last token, and `accept_prob_fn(accept_prob)`."""
    sequence, outputs = emission.sequence, emission.outputs
    if sequence.num_draft == 0:
        return
    index = sequence.draft_row(row)
    log_p, accept_prob = tables.log_p[index], tables.accept_prob[index]

    @pl.when(row != stop.num_accepted)
    def _():
        outputs.log_probs[sequence.number, row] = jnp.where(row < stop.num_accepted, log_p, 0.0)

    @pl.when(row < sequence.num_draft)
    def _():
        outputs.accept_prob[sequence.number, row] = accept_prob_fn(accept_prob)
