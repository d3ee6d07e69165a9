"""The distributions p and q of rows of logits: normalizers, probabilities, log-probabilities of single tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import LARGEST_LOG_NORMALIZER, Draft, Filter
from specsamp_jax.sampling.mesh_axes import cond
from specsamp_jax.sampling.reduce import SMALL, map_rows, row_max, row_sum, wide


class Rows(NamedTuple):
    """R rows of logits per sequence and their normalizers: log-probabilities are `(logit - offset) * scale - log_sum`.

    Attributes:
      logits: Output of the model. None for a deterministic drafter, whose rows each have one token of probability 1.
      filter: The scale and the cutoff of each row.
      offset: Subtracted from the logits: the largest of the row, or 0 if only the logsumexp was given.
      log_sum: Logsumexp of `(logit - offset) * scale` over the tokens that the filter keeps.
      certain: The token that has probability 1 in a greedy or deterministic row, -1 in others. None if all are -1.
      degenerate: True for rows that define no distribution: NaN or +inf among the logits, or all of them -inf.
    """

    logits: Float[Array, "B R V"] | None
    filter: Filter
    offset: Float[Array, "B R"]
    log_sum: Float[Array, "B R"]
    certain: Int[Array, "B R"] | None
    degenerate: Bool[Array, "B R"]

    @property
    def log_normalizers(self) -> Float[Array, "B R"]:
        """Logsumexp of the filtered logits."""
        return _rounded(scaled(self.offset, self.filter.scale)) + self.log_sum

    def first(self, num_rows: int) -> "Rows":
        """The first rows of each sequence."""
        return self._each(lambda array: array[:, :num_rows])

    def take(self, row: Int[Array, "B"]) -> "Rows":
        """One row of each sequence, R = 1."""
        return self._each(lambda array: take_row(array, row)[:, None])

    def _each(self, fn) -> "Rows":
        # The cutoffs of rows without logits are not read, and may be empty.
        cutoff = self.filter.cutoff if self.filter.cutoff is None or self.logits is None else fn(self.filter.cutoff)
        rest = jax.tree.map(fn, (self.logits, *self[2:]))
        return Rows(rest[0], self.filter._replace(cutoff=cutoff), *rest[1:])


def target_rows(logits: Float[Array, "B R V"], filter: Filter) -> Rows:
    """Rows of the target; a greedy row has probability 1 on its first largest logit."""
    offset, log_sum = _offset_and_log_sum(logits, filter)
    certain = None
    if filter.greedy is not None:
        none = jnp.full(offset.shape, -1, jnp.int32)
        certain = cond(filter.greedy.any(), lambda: map_rows(first_largest, logits), lambda: none)
        certain = jnp.where(filter.greedy[:, None], certain, -1)
        log_sum = jnp.where(filter.greedy[:, None] & jnp.isfinite(log_sum), 0, log_sum)
    return Rows(logits, filter, offset, log_sum, certain, ~jnp.isfinite(offset + log_sum))


def draft_rows(draft: Draft, filter: Filter) -> Rows:
    """Rows of the draft; its logits are read only if `draft.log_normalizers` is None or too large for float32.

    A row drafted greedily or by a deterministic drafter has probability 1 on its drafted token.
    """
    tokens, logits = draft.tokens, draft.logits
    if logits is None:
        zeros = jnp.zeros(tokens.shape, jnp.float32)
        return Rows(None, filter, zeros, zeros, tokens, jnp.zeros(tokens.shape, bool))
    if draft.log_normalizers is None:
        offset, log_sum = _offset_and_log_sum(logits, filter)
    else:
        log_normalizers = draft.log_normalizers.astype(wide(logits[:0]).dtype)
        coarse = ~(jnp.abs(log_normalizers) <= LARGEST_LOG_NORMALIZER)

        def read_again():
            computed = _offset_and_log_sum(logits, filter)
            return jnp.where(coarse, computed[0], 0), jnp.where(coarse, computed[1], log_normalizers)

        offset, log_sum = cond(coarse.any(), read_again, lambda: (jnp.zeros_like(log_normalizers), log_normalizers))
    certain = None if filter.greedy is None else jnp.where(filter.greedy[:, None], tokens, -1)
    return Rows(logits, filter, offset, log_sum, certain, ~jnp.isfinite(offset + log_sum))


def _offset_and_log_sum(logits: Float[Array, "B R V"], filter: Filter) -> tuple[Array, Array]:
    """Offset and log_sum of every row: a pass for the maximum, one for the sum, and one more if a cutoff applies."""
    if logits.dtype == jnp.float16 or logits.shape[-1] < SMALL:
        # XLA's CPU backend writes a float32 copy of float16 logits before it reduces them, and `_fold` writes a
        # temporary too: one row at a time keeps that copy at `[B, V]`.
        offset, log_sum = map_rows(lambda row: _log_sum(row, filter.scale), logits)
    else:
        # Without comparisons XLA fuses all of it, so all rows are taken at once.
        offset, log_sum = _log_sum(logits, filter.scale)
    cutoff = filter.cutoff
    if cutoff is None:
        return offset, log_sum
    # A row without a cutoff keeps the sum above, so that its bits do not depend on the cutoffs of other rows.
    cuts = cutoff > -jnp.inf

    def kept():
        log_kept = map_rows(lambda z, top, cut: _log_kept_sum(z, top, cut, filter.scale), logits, offset, cutoff)
        # A comparison would drop NaN: the sum over the whole row shows it.
        return jnp.where(cuts & jnp.isfinite(log_sum), log_kept, log_sum)

    return offset, cond(cuts.any(), kept, lambda: log_sum)


def _log_sum(logits: Array, scale: Float[Array, "B"] | None) -> tuple[Array, Array]:
    """The maximum of each row, and the logsumexp of `(logits - maximum) * scale`."""
    # The maximum is taken in the logits' own type: XLA would write a widened copy that has two readers to memory.
    offset = wide(row_max(logits, logits.shape[-1]))
    weights = jnp.exp(scaled(wide(logits) - offset[..., None], scale))
    return offset, jnp.log(row_sum(weights, logits.shape[-1]))


def _log_kept_sum(
    logits: Float[Array, "B V"], offset: Float[Array, "B"], cutoff: Float[Array, "B"], scale: Float[Array, "B"] | None
) -> Float[Array, "B"]:
    """Logsumexp of `(logits - offset) * scale` over the logits that are not below the cutoff."""
    weights = jnp.exp(scaled(wide(logits) - offset[:, None], scale))
    return jnp.log(row_sum(jnp.where(wide(logits) >= cutoff[:, None], weights, 0), logits.shape[-1]))


def scaled(values: Array, scale: Float[Array, "B"] | None) -> Array:
    """Values `[B, ...]` times the scale of their row; None is 1."""
    return values if scale is None else values * scale.reshape(-1, *(1,) * (values.ndim - 1))


def _rounded(product: Array) -> Array:
    """The product, rounded before a sum: XLA's CPU backend else rounds both at once, in some batch sizes only."""
    return lax.optimization_barrier(product)


def take_row(array: Array, row: Int[Array, "B"]) -> Array:
    """Selects one row of each sequence: `[B, ...]` from `[B, R, ...]`."""
    # Rows are never negative or too large: without this, operations would wrap the one and fill the other.
    return jax.vmap(lambda rows, index: rows.at[index].get(mode="clip", wrap_negative_indices=False))(array, row)


def token_logits(rows: Rows, tokens: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """The logit of one token per row, `(logit - offset) * scale`; -inf if filtered out or not in [0, V).

    0 for a deterministic drafter, which has no logits.
    """
    if rows.logits is None:
        return jnp.zeros_like(rows.offset)
    # A token outside the vocabulary reads any logit, which the mask drops.
    logits = jnp.take_along_axis(rows.logits, tokens[..., None], axis=-1, mode="clip")[..., 0]
    return _token_logits(rows, tokens, logits, rows.logits.shape[-1])


def _token_logits(rows: Rows, tokens: Array, logits: Array, vocab_size: int) -> Array:
    """`token_logits`, with the logits of the tokens in the model's own type, as they were read."""
    logits = wide(logits)
    outside = (tokens < 0) | (tokens >= vocab_size)
    if rows.filter.cutoff is not None:
        outside |= logits < rows.filter.cutoff
    return jnp.where(outside, -jnp.inf, scaled(logits - rows.offset, rows.filter.scale))


def log_prob(rows: Rows, tokens: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """Log-probability of one token per row; -inf if it has probability 0 or if the row is degenerate."""
    return _log_prob(rows, tokens, token_logits(rows, tokens))


def log_prob_at(rows: Rows, row: Int[Array, "B"], tokens: Int[Array, "B n"]) -> Float[Array, "B n"]:
    """Log-probabilities of n tokens in one row of each sequence, like `log_prob`; only their logits are read."""
    at = rows.take(row)
    if rows.logits is None:
        return _log_prob(at, tokens, jnp.zeros(tokens.shape, rows.offset.dtype))
    read = jax.vmap(lambda rows, row, tokens: rows.at[row, tokens].get(mode="clip", wrap_negative_indices=False))
    logits = read(rows.logits, row, tokens)
    return _log_prob(at, tokens, _token_logits(at, tokens, logits, rows.logits.shape[-1]))


def _log_prob(rows: Rows, tokens: Array, logits: Array) -> Array:
    value = _rounded(logits) - rows.log_sum
    if rows.certain is not None:
        value = jnp.where(rows.certain < 0, value, jnp.where(rows.certain == tokens, 0, -jnp.inf))
    # Rounding of the logit and the logsumexp must not give a probability above 1.
    return jnp.where(rows.degenerate, -jnp.inf, jnp.minimum(value, 0))


def log_ratio(log_p: Float[Array, "*B"], log_q: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`log_p - log_q`; -inf where p is zero, also where q is: no NaN, for which `jax_debug_nans` stops a program."""
    possible = log_p > -jnp.inf
    return jnp.where(possible, log_p - jnp.where(possible, log_q, 0), -jnp.inf)


def probs(row: Rows, vocab_size: int) -> Float[Array, "B V"]:
    """Probabilities of one row per sequence."""
    index = jnp.arange(vocab_size)
    if row.logits is None:
        return (index == row.certain).astype(row.offset.dtype)
    logits = wide(row.logits[:, 0])
    result = jnp.exp(scaled(logits - row.offset, row.filter.scale) - row.log_sum)
    if row.filter.cutoff is not None:
        result = jnp.where(logits >= row.filter.cutoff, result, 0)
    if row.certain is not None:
        result = jnp.where(row.certain >= 0, (index == row.certain).astype(result.dtype), result)
    return result


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Index of the first largest logit, NaN ignored; 0 if all are NaN. Always below V."""
    numbers = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    # Not `argmax`, which XLA's CPU backend does not vectorise: two passes take a ninth of its time.
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(numbers == numbers.max(-1, keepdims=True), index, jnp.iinfo(jnp.int32).max).min(-1)
