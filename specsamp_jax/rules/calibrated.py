"""The calibrated sigmoid rule: the scores of the paper around an estimate of each row's log-normaliser."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from specsamp_jax._types import Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.draw import replace_degenerate


class RowReport(NamedTuple):
    """Errors of the estimates of one step, known after its rows were read.

    Attributes:
      log_normalizers: Logsumexp of each target row after `sampling`.
      error: The estimate less `log_normalizers`; 0 in greedy rows, which need no estimate.
      bound: Bound on the total variation between the law of the token at each draft position and the target's.
    """

    log_normalizers: Float[Array, "B K1"]
    error: Float[Array, "B K"]
    bound: Float[Array, "B K"]


def verify_calibrated(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
    *,
    offset: int | float,
    log_normalizers: Float[Array, "B K"] | None = None,
) -> tuple[Verification, RowReport]:
    """Returns the verification by the sigmoid rule of width 1 with alpha = estimate + `offset`, and its errors.

    Let `h` be the probability that the estimate gives, `exp(z - estimate)` and at most 1, and `eps = exp(-offset)`. The
    scores are `eps h/(1 + eps h)` and `eps q/(1 + eps q)`, so that a draft is accepted with probability
    `a = min(1, h (1 + eps q) / (q (1 + eps h)))`. The row of the last token is read, so its p is exact: after a
    rejection the token is sampled from max(0, p - q a), after K acceptances from p. Only `log_probs` and the report
    need a pass over all rows.

    Args:
      target_logits: As in `verify`.
      target_filter: The filter of `target_logits`.
      draft: As in `verify`.
      draft_filter: The filter of `draft.logits`.
      uniforms: The draws.
      offset: The distance of alpha from the estimate, c.
      log_normalizers: Estimates of the logsumexp of the target's rows; +inf rejects the draft. None: the exact values.

    Source: after Wagner et al. (2024, arXiv 2406.11016), with another residual; docs/algorithms.md has the proof.
    """
    tokens, vocab_size = draft.tokens, target_logits.shape[-1]
    eps = float(np.exp(-offset))
    target = dist.target_rows(target_logits, target_filter)
    drafter = dist.draft_rows(draft, draft_filter)

    scored = target.first(tokens.shape[1])
    guessed = scored
    if log_normalizers is not None:
        log_normalizers = log_normalizers.astype(scored.log_sum.dtype)
        guessed = scored._replace(offset=jnp.zeros_like(scored.offset), log_sum=log_normalizers)
    # A greedy row is certain of its token under any estimate; `log_prob` is at most 0.
    log_h, log_q = dist.log_prob(guessed, tokens), dist.log_prob(drafter, tokens)
    saturation = jnp.log1p(eps * emit.exp(log_q)) - jnp.log1p(eps * emit.exp(log_h))
    drafted = emit.draft_mask(tokens)
    trusted = drafted & (log_q > -jnp.inf) & (tokens < vocab_size)
    usable = trusted & (log_h > -jnp.inf)
    log_ratio = jnp.where(usable, dist.log_ratio(log_h, log_q) + saturation, -jnp.inf)
    accept_prob = emit.exp(jnp.minimum(log_ratio, 0))
    num_accepted = emit.num_leading(usable & (jnp.log(uniforms.accept) < log_ratio))

    last = target.take(num_accepted)
    p = dist.probs(last, vocab_size)
    residual, rejecting = p, jnp.zeros((p.shape[0], 1), bool)
    if tokens.shape[1] > 0:
        row, rejecting = emit.last_draft_row(drafter, trusted, num_accepted)
        h = jnp.minimum(dist.probs(guessed.take(jnp.minimum(num_accepted, tokens.shape[1] - 1)), vocab_size), 1)
        taken = _taken(h, dist.probs(row, vocab_size), eps)
        residual = jnp.maximum(p - jnp.where(rejecting, taken, 0), 0)
    token, empty = emit.sample_residual(residual, lambda: dist.probs(last, vocab_size), uniforms.emit)
    token = replace_degenerate(token, dist.take_row(target_logits, num_accepted), last.degenerate[:, 0])

    verification = emit.pack(
        tokens,
        num_accepted,
        token,
        dist.log_prob(scored, tokens),
        dist.log_prob(last, token[:, None])[:, 0],
        accept_prob,
        emit.status(
            emit.in_use(target.degenerate, num_accepted),
            emit.in_use(drafted & ~trusted, num_accepted),
            (rejecting & ~last.degenerate)[:, 0] & empty,
        ),
    )
    return verification, _report(target, scored, log_normalizers, offset)


def bound(error: Float[Array, "*B"], offset: int | float) -> Float[Array, "*B"]:
    """Returns 1 - 1/max(1, (1 + exp(-c)) exp(-error)), a bound on the total variation of one token's law.

    Args:
      error: The estimate of the row's log-normaliser less the exact value.
      offset: c.
    """
    # 1 + exp(-c) bounds the sigmoid's saturation.
    return -jnp.expm1(-jnp.maximum(float(np.log1p(np.exp(-offset))) - error, 0))


def _taken(h: Float[Array, "B V"], q: Float[Array, "B V"], eps: float) -> Float[Array, "B V"]:
    """The probability q a of drafting and accepting each token: min(q, h (1 + eps q)/(1 + eps h)).

    Written so that rounding never brings it below h where q exceeds h: with h = p the residual is 0 there.
    """
    return jnp.where(q <= h, q, h * (1 + eps * (q - h) / (1 + eps * h)))


def _report(
    target: dist.Rows, scored: dist.Rows, log_normalizers: Float[Array, "B K"] | None, offset: int | float
) -> RowReport:
    exact = scored.log_normalizers
    error = jnp.zeros_like(exact) if log_normalizers is None else log_normalizers - exact
    settled = scored.degenerate if scored.certain is None else scored.degenerate | (scored.certain >= 0)
    error = jnp.where(settled, 0, error)
    return RowReport(target.log_normalizers, error, jnp.where(settled, 0, bound(error, offset)))
