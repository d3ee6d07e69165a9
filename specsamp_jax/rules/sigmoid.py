"""The sigmoid rule of the paper, an approximation: element-wise scores replace probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax import _checks
from specsamp_jax._types import Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.draw import replace_degenerate
from specsamp_jax.sampling.reduce import wide


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
    *,
    alpha: int | float,
    beta: int | float,
) -> Verification:
    """The sigmoid rule of Wagner et al. (2024, arXiv 2406.11016), `s(z) = sigmoid((z - alpha)/(beta - alpha))`.

    Accepts with probability min(1, s_p(x)/s_q(x)); the residual is max(0, s_p - s_q), the bonus s_p. A token that is
    filtered out scores 0; in a greedy row, or a row of a deterministic drafter, its token scores 1 and the others 0. A
    last row whose scores all underflow is degenerate. Acceptance reads one logit per row; only `log_probs` need a pass
    over all rows, which XLA removes if they are unused.
    """
    tokens, vocab_size = draft.tokens, target_logits.shape[-1]
    target = dist.target_rows(target_logits, target_filter)
    drafter = dist.draft_rows(draft._replace(log_normalizers=jnp.zeros(tokens.shape)), draft_filter)

    scored = target.first(tokens.shape[1])
    score_p = _token_score(scored, tokens, alpha, beta)
    score_q = _token_score(drafter, tokens, alpha, beta)
    drafted = emit.draft_mask(tokens)
    usable = drafted & (score_p > 0)
    accept_prob = jnp.where(usable & ~jnp.isnan(score_q), jnp.minimum(score_p / jnp.where(usable, score_q, 1), 1), 0)
    # Strictly less, because u can be 0. A score of NaN rejects.
    num_accepted = emit.num_leading(usable & (uniforms.accept * score_q < score_p))

    last = target.take(num_accepted)
    last_logits = dist.take_row(target_logits, num_accepted)
    last = last._replace(degenerate=_degenerate(last) | ~_has_scores(last, last_logits, alpha, beta))
    scores = _scores(last, vocab_size, alpha, beta)
    residual, rejecting, distrusted = scores, *(jnp.zeros((scores.shape[0], 1), bool) for _ in range(2))
    if tokens.shape[1] > 0:
        row, stopped = emit.last_draft_row(drafter, drafted, num_accepted)
        beyond = dist.take_row(jnp.pad(tokens, ((0, 0), (0, 1))), num_accepted)[:, None] >= vocab_size
        distrusted = stopped & (beyond | _degenerate(row))
        rejecting = stopped & ~distrusted
        residual = jnp.where(rejecting, _residual(last, row, vocab_size, alpha, beta), scores)
    token, empty = emit.sample_residual(residual, lambda: _scores(last, vocab_size, alpha, beta), uniforms.emit)
    token = replace_degenerate(token, last_logits, last.degenerate[:, 0])

    return emit.pack(
        tokens,
        num_accepted,
        token,
        dist.log_prob(scored, tokens),
        dist.log_prob(target.take(num_accepted), token[:, None])[:, 0],
        accept_prob,
        emit.status(last.degenerate[:, 0], distrusted[:, 0], (rejecting & ~last.degenerate)[:, 0] & empty),
    )


def check_width(alpha: Any, beta: Any) -> None:
    """Raises ValueError unless alpha and beta are numbers whose difference is a positive normal float32."""
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not _checks.is_number(value):
            raise ValueError(f"{name} must be a Python number, because it is compiled in; got {value!r}.")
    if not beta > alpha:
        raise ValueError(f"beta must be above alpha; got alpha = {alpha}, beta = {beta}. Are they swapped?")
    limits = jnp.finfo(jnp.float32)
    tiny, largest = float(limits.tiny), float(limits.max)
    if not (abs(alpha) <= largest and tiny <= beta - alpha <= largest):
        raise ValueError(
            f"beta - alpha must be a width from {tiny:.1e} to {largest:.1e}, in float32; got alpha = {alpha:.3g}, "
            f"beta = {beta:.3g}."
        )


def _degenerate(row: dist.Rows) -> Bool[Array, "B 1"]:
    """True for a row without a distribution of scores: NaN or +inf among the logits, or all of them -inf."""
    if row.logits is None:
        return jnp.zeros(row.offset.shape, bool)
    return ~jnp.isfinite(row.logits.max(-1)) | jnp.isnan(row.logits).any(-1)


def _has_scores(
    row: dist.Rows, logits: Float[Array, "B V"], alpha: int | float, beta: int | float
) -> Bool[Array, "B 1"]:
    """Whether a row has a positive score: that of its largest logit, which every filter keeps, or of its token."""
    positive = _score(_scaled(wide(logits.max(-1, keepdims=True)), row.filter), alpha, beta) > 0
    return positive if row.certain is None else positive | (row.certain >= 0)


def _scaled(logits: Float[Array, "B n"], filter: Filter) -> Float[Array, "B n"]:
    return logits if filter.scale is None else logits * filter.scale[:, None]


def _score(z: Array, alpha: int | float, beta: int | float) -> Array:
    return jax.nn.sigmoid((z - alpha) / (beta - alpha))


def _token_score(
    rows: dist.Rows, tokens: Int[Array, "B R"], alpha: int | float, beta: int | float
) -> Float[Array, "B R"]:
    """The score of one token per row."""
    absolute = rows._replace(offset=jnp.zeros_like(rows.offset))
    # Behind barriers: fused, XLA's CPU backend would choose the exponential by the operations before it.
    logits = lax.optimization_barrier(dist.token_logits(absolute, tokens))
    score = lax.optimization_barrier(_score(logits, alpha, beta))
    if rows.certain is not None:
        score = jnp.where(rows.certain < 0, score, (rows.certain == tokens).astype(score.dtype))
    return score


def _kept(logits: Float[Array, "B 1 V"], filter: Filter) -> tuple[Float[Array, "B V"], Bool[Array, "B V"]]:
    """The scaled logits of one row per sequence, and the mask of those that the filter keeps."""
    z = wide(logits[:, 0])
    kept = z > -jnp.inf
    if filter.cutoff is not None:
        kept &= z >= filter.cutoff
    return _scaled(z, filter), kept


def _scores(row: dist.Rows, vocab_size: int, alpha: int | float, beta: int | float) -> Float[Array, "B V"]:
    """The scores of one row per sequence."""
    index = jnp.arange(vocab_size)
    if row.logits is None:
        return (index == row.certain).astype(row.offset.dtype)
    z, kept = _kept(row.logits, row.filter)
    scores = jnp.where(kept, _score(z, alpha, beta), 0)
    if row.certain is None:
        return scores
    return jnp.where(row.certain < 0, scores, (index == row.certain).astype(scores.dtype))


def _residual(
    p: dist.Rows, q: dist.Rows, vocab_size: int, alpha: int | float, beta: int | float
) -> Float[Array, "B V"]:
    """max(0, s_p - s_q) of one row per sequence.

    Subtracting sigmoids of arguments a and b that differ by 1e-4 would leave three digits. `-sigmoid(a) sigmoid(-b)
    expm1(b - a)` equals the difference without cancellation.
    """
    score_p, score_q = (_scores(row, vocab_size, alpha, beta) for row in (p, q))
    difference = score_p - score_q
    if p.logits is not None and q.logits is not None:
        (z_p, kept_p), (z_q, kept_q) = _kept(p.logits, p.filter), _kept(q.logits, q.filter)
        soft = kept_p & kept_q
        for row in (p, q):
            if row.certain is not None:
                soft &= row.certain < 0
        z_p, z_q = (jnp.where(soft, z, 0) for z in (z_p, z_q))
        # Clipped to 0, where the residual is 0 because z_q >= z_p: 0 times an infinite expm1 would be NaN.
        above = jnp.minimum((z_q - z_p) / (beta - alpha), 0)
        exact = -score_p * jax.nn.sigmoid((alpha - z_q) / (beta - alpha)) * jnp.expm1(above)
        difference = jnp.where(soft, exact, difference)
    return jnp.maximum(difference, 0)
