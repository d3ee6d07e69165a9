"""The coupled rule: accept drafts while they equal the samples that the target draws with its own Gumbel noise."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from specsamp_jax._types import Draft, Filter, Verification
from specsamp_jax.rules import emit
from specsamp_jax.sampling import gumbel
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.draw import replace_degenerate


def verify_coupled(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    keys: Key[Array, "B K1"],
) -> Verification:
    """Returns the verification by the coupled rule (Daliri et al., 2024, arXiv 2408.07978, with Gumbel noise).

    The target's sample at row i is `y_i = argmax(log p_i + G_i)`, with the noise G_i of `keys[:, i]`. The drafts are
    accepted while `x_i = y_i`; the last token is the y of the row after them. There is no residual. The token y_i has
    the law p_i given the tokens before it, because G_i is independent of the noise at earlier positions; the drafts do
    not enter. q is read for `accept_prob` and `status` alone.
    """
    tokens, vocab_size = draft.tokens, target_logits.shape[-1]
    target = dist.target_rows(target_logits, target_filter)
    drafter = dist.draft_rows(draft, draft_filter)
    samples = gumbel.largest_perturbed(target_logits, target, keys)

    scored = target.first(tokens.shape[1])
    log_p, log_q = dist.log_prob(scored, tokens), dist.log_prob(drafter, tokens)
    drafted = emit.draft_mask(tokens)
    # The -1 after the last draft equals no sample.
    agrees = (tokens == samples[:, :-1]) & ~scored.degenerate
    num_accepted = emit.num_leading(agrees)

    last = target.take(num_accepted)
    last_logits = dist.take_row(target_logits, num_accepted)
    token = replace_degenerate(dist.take_row(samples, num_accepted), last_logits, last.degenerate[:, 0])
    log_prob = dist.log_prob(last, token[:, None])[:, 0]

    # As in the token rule: a draft of q = 0, or from a degenerate row, sets the flag.
    trusted = drafted & (log_q > -jnp.inf) & (tokens < vocab_size)
    accept_prob = jnp.where(trusted & (log_p > -jnp.inf), emit.exp(jnp.minimum(dist.log_ratio(log_p, log_q), 0)), 0)
    status = emit.status(
        emit.in_use(target.degenerate, num_accepted),
        emit.in_use(drafted & ~trusted, num_accepted),
        jnp.zeros_like(last.degenerate[:, 0]),
    )
    return emit.pack(tokens, num_accepted, token, log_p, log_prob, accept_prob, status)
