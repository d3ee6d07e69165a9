"""p and q of rows of logits: normalizers, probabilities, log-probabilities of single tokens."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import LARGEST_LOG_NORMALIZER, Draft, Filter
from specsamp_jax.sampling.mesh_axes import cond
from specsamp_jax.sampling.reduce import SMALL, map_rows, row_max, row_sum, wide


class Rows(NamedTuple):
    """R rows of logits a sequence, and what makes a distribution of each, `(logit - offset) * scale - log_sum`.

    Attributes:
      logits: As a model gave them. None: a drafter without chance, all of whose rows are certain.
      filter: The scale and the cutoff of each row.
      offset: Subtracted from the logits: the largest of the row, or 0 where only the logsumexp is known.
      log_sum: Logarithm of the sum of exponentials of the kept `(logit - offset) * scale`.
      certain: The token that has all probability in rows where one has, -1 in others. None: no row is such.
      degenerate: True where no distribution can be made: NaN or +inf among the logits, or none above -inf.
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
        return _scaled(self.offset, self.filter.scale) + self.log_sum

    def first(self, num_rows: int) -> "Rows":
        """The first rows of each sequence."""
        return self._each(lambda array: array[:, :num_rows])

    def take(self, row: Int[Array, "B"]) -> "Rows":
        """One row of each sequence, R = 1."""
        return self._each(lambda array: take_row(array, row)[:, None])

    def _each(self, fn) -> "Rows":
        cutoff = None if self.filter.cutoff is None else fn(self.filter.cutoff)
        rest = jax.tree.map(fn, (self.logits, *self[2:]))
        return Rows(rest[0], self.filter._replace(cutoff=cutoff), *rest[1:])


def target_rows(logits: Float[Array, "B R V"], filter: Filter) -> Rows:
    """The target's rows; a greedy one is certain of its first largest logit."""
    offset, log_sum = _offset_and_log_sum(logits, filter)
    certain = None
    if filter.greedy is not None:
        nowhere = jnp.full(offset.shape, -1, jnp.int32)
        certain = cond(filter.greedy.any(), lambda: map_rows(first_largest, logits), lambda: nowhere)
        certain = jnp.where(filter.greedy[:, None], certain, -1)
        log_sum = jnp.where(filter.greedy[:, None] & jnp.isfinite(log_sum), 0, log_sum)
    return Rows(logits, filter, offset, log_sum, certain, ~jnp.isfinite(offset + log_sum))


def draft_rows(draft: Draft, filter: Filter) -> Rows:
    """The draft's rows, read from its logits only where the normalizers were not handed over.

    A row that was drafted without chance, greedily or by no model at all, is certain of its drafted token.
    """
    tokens, logits = draft.tokens, draft.logits
    if logits is None:
        zeros = jnp.zeros(tokens.shape)
        return Rows(None, filter, zeros, zeros, tokens, jnp.zeros(tokens.shape, bool))
    if draft.log_normalizers is None:
        offset, log_sum = _offset_and_log_sum(logits, filter)
    else:
        known = draft.log_normalizers.astype(wide(logits[:0]).dtype)
        coarse = ~(jnp.abs(known) <= LARGEST_LOG_NORMALIZER)

        def read_again():
            computed = _offset_and_log_sum(logits, filter)
            return jnp.where(coarse, computed[0], 0), jnp.where(coarse, computed[1], known)

        offset, log_sum = cond(coarse.any(), read_again, lambda: (jnp.zeros_like(known), known))
    certain = None if filter.greedy is None else jnp.where(filter.greedy[:, None], tokens, -1)
    return Rows(logits, filter, offset, log_sum, certain, ~jnp.isfinite(offset + log_sum))


def _offset_and_log_sum(logits: Float[Array, "B R V"], filter: Filter) -> tuple[Array, Array]:
    """Offset and log_sum of every row: one pass for the maximum, one for the sum, one more where a filter is on."""
    if logits.dtype == jnp.float16 or logits.shape[-1] < SMALL:
        # XLA's CPU backend widens float16 into a temporary before it reduces it, and a fold is one: a row at a time.
        offset, log_sum = map_rows(lambda row: _log_sum(row, filter.scale), logits)
    else:
        # No comparison in sight: XLA fuses the whole of it, for all rows at once.
        offset, log_sum = _log_sum(logits, filter.scale)
    cutoff = filter.cutoff
    if cutoff is None:
        return offset, log_sum
    # A row that is not cut keeps the sum above, whatever its neighbours are: other code may add in another order.
    cuts = cutoff > -jnp.inf

    def kept():
        log_kept = map_rows(lambda z, top, cut: _log_kept_sum(z, top, cut, filter.scale), logits, offset, cutoff)
        # NaN anywhere in the row stays in the sum of the whole row.
        return jnp.where(cuts & jnp.isfinite(log_sum), log_kept, log_sum)

    return offset, cond(cuts.any(), kept, lambda: log_sum)


def _log_sum(logits: Array, scale: Float[Array, "B"] | None) -> tuple[Array, Array]:
    """The largest of each row, and the logarithm of the sum of exponentials beside it."""
    # The maximum in the logits' own type: a widened copy with two readers would be written out.
    offset = wide(row_max(logits, logits.shape[-1]))
    weights = jnp.exp(_scaled(wide(logits) - offset[..., None], scale))
    return offset, jnp.log(row_sum(weights, logits.shape[-1]))


def _log_kept_sum(
    logits: Float[Array, "B V"], offset: Float[Array, "B"], cutoff: Float[Array, "B"], scale: Float[Array, "B"] | None
) -> Float[Array, "B"]:
    """The logarithm of the sum of exponentials of the logits that are not below the cutoff."""
    weights = jnp.exp(_scaled(wide(logits) - offset[:, None], scale))
    return jnp.log(row_sum(jnp.where(wide(logits) >= cutoff[:, None], weights, 0), logits.shape[-1]))


def _scaled(values: Array, scale: Float[Array, "B"] | None) -> Array:
    return values if scale is None else values * scale.reshape(-1, *(1,) * (values.ndim - 1))


def take_row(array: Array, row: Int[Array, "B"]) -> Array:
    """One row of each sequence, `[B, ...]` of `[B, R, ...]`."""
    return jnp.take_along_axis(array, row.reshape(-1, *(1,) * (array.ndim - 1)), axis=1)[:, 0]


def token_logits(rows: Rows, tokens: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """One filtered logit a row: scaled, and -inf where cut off or where the token is not in [0, V).

    0 where there are no logits, for all of those rows are certain.
    """
    if rows.logits is None:
        return jnp.zeros(tokens.shape)
    vocab_size = rows.logits.shape[-1]
    index = jnp.clip(tokens, 0, vocab_size - 1)[..., None]
    logit = wide(jnp.take_along_axis(rows.logits, index, axis=-1)[..., 0])
    outside = (tokens < 0) | (tokens >= vocab_size)
    if rows.filter.cutoff is not None:
        outside |= logit < rows.filter.cutoff
    return jnp.where(outside, -jnp.inf, _scaled(logit - rows.offset, rows.filter.scale))


def log_prob(rows: Rows, tokens: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """log-probability of one token a row; -inf where it has none, or where the row is degenerate."""
    value = token_logits(rows, tokens) - rows.log_sum
    if rows.certain is not None:
        value = jnp.where(rows.certain < 0, value, jnp.where(rows.certain == tokens, 0, -jnp.inf))
    # A logit and a logsumexp that were rounded apart must not make a probability above one.
    return jnp.where(rows.degenerate, -jnp.inf, jnp.minimum(value, 0))


def probs(row: Rows, vocab_size: int) -> Float[Array, "B V"]:
    """Probabilities of one row a sequence."""
    index = jnp.arange(vocab_size)
    if row.logits is None:
        return (index == row.certain).astype(row.offset.dtype)
    logits = wide(row.logits[:, 0])
    result = jnp.exp(_scaled(logits - row.offset, row.filter.scale) - row.log_sum)
    if row.filter.cutoff is not None:
        result = jnp.where(logits >= row.filter.cutoff, result, 0)
    if row.certain is not None:
        result = jnp.where(row.certain >= 0, index == row.certain, result)
    return result


def first_largest(logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Index of the first largest logit that is a number; 0 where none is. Always below V."""
    numbers = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    # Not `argmax`, which XLA's CPU backend does not vectorise: two passes take a ninth of its time.
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(numbers == numbers.max(-1, keepdims=True), index, jnp.iinfo(jnp.int32).max).min(-1)
