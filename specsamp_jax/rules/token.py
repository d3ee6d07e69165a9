"""The token rule: accept each draft with probability min(1, p/q), else sample max(0, p - q)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from specsamp_jax._types import Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.draw import replace_degenerate


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
) -> Verification:
    """Returns the verification by the token rule (Leviathan et al., 2023, arXiv 2211.17192, algorithm 1).

    Draft i is accepted iff `log u_i < log p_i(x_i) - log q_i(x_i)`: strictly, since u can be 0, and with the
    difference on the right, since the product of u below 1 and q can round up to an equal p. The logsumexp
    of every row is computed, and the vocabulary is read again in one row per sequence only.

    Source: Leviathan et al. (2023, arXiv 2211.17192, algorithm 1); Chen et al. (2023, arXiv 2302.01318).
    """
    tokens, vocab_size = draft.tokens, target_logits.shape[-1]
    target = dist.target_rows(target_logits, target_filter)
    drafter = dist.draft_rows(draft, draft_filter)

    scored = target.first(tokens.shape[1])
    log_p = dist.log_prob(scored, tokens)
    log_q = dist.log_prob(drafter, tokens)
    log_ratio = dist.log_ratio(log_p, log_q)
    drafted = emit.draft_mask(tokens)
    # A token of q = 0, and one from a degenerate row of the draft, is rejected and replaced by a sample from p. The q
    # of a deterministic drafter is 1 at its token, which still must be in the vocabulary.
    trusted = drafted & (log_q > -jnp.inf) & (tokens < vocab_size)
    usable = trusted & (log_p > -jnp.inf)
    accept_prob = jnp.where(usable, emit.exp(jnp.minimum(log_ratio, 0)), 0)
    num_accepted = emit.num_leading(usable & (jnp.log(uniforms.accept) < log_ratio))

    last = target.take(num_accepted)
    p = dist.probs(last, vocab_size)
    residual, rejecting = p, jnp.zeros((p.shape[0], 1), bool)
    if tokens.shape[1] > 0:
        row, rejecting = emit.last_draft_row(drafter, trusted, num_accepted)
        residual = jnp.maximum(p - jnp.where(rejecting, dist.probs(row, vocab_size), 0), 0)
    token, empty = emit.sample_residual(residual, lambda: dist.probs(last, vocab_size), uniforms.emit)
    last_logits = dist.take_row(target_logits, num_accepted)
    token = replace_degenerate(token, last_logits, last.degenerate[:, 0])

    log_prob = dist.log_prob(last, token[:, None])[:, 0]
    status = emit.status(
        emit.in_use(target.degenerate, num_accepted),
        emit.in_use(drafted & ~trusted, num_accepted),
        (rejecting & ~last.degenerate)[:, 0] & empty,
    )
    return emit.pack(tokens, num_accepted, token, log_p, log_prob, accept_prob, status)
