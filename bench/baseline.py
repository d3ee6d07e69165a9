"""The usual way to write the verification step; Wagner et al. (2024, arXiv 2406.11016) call it the baseline."""

import jax
import jax.numpy as jnp
from experiments.paper import lay_out
from jaxtyping import Array, Float, Int, Key


def verify_baseline(
    key: Key[Array, ""],
    target_logits: Float[Array, "B K1 V"],
    draft_logits: Float[Array, "B K V"],
    draft_tokens: Int[Array, "B K"],
) -> tuple[Int[Array, "B K1"], Int[Array, "B"]]:
    """Returns the emitted tokens, padded with -1, and the number of accepted drafts.

    Computes both softmaxes, then the residuals of all K rows, then samples from one row per sequence.
    """
    accept_key, sample_key = jax.random.split(key)
    p, q = jax.nn.softmax(target_logits), jax.nn.softmax(draft_logits)

    index = draft_tokens[..., None]
    p_drafted = jnp.take_along_axis(p[:, :-1], index, axis=-1)[..., 0]
    q_drafted = jnp.take_along_axis(q, index, axis=-1)[..., 0]
    accepted = jax.random.uniform(accept_key, draft_tokens.shape) * q_drafted < p_drafted
    num_accepted = jnp.cumprod(accepted, axis=1).sum(1)

    residual = jnp.maximum(p[:, :-1] - q, 0)
    residual /= residual.sum(-1, keepdims=True)
    rows = jnp.concatenate([residual, p[:, -1:]], axis=1)
    row = jnp.take_along_axis(rows, num_accepted[:, None, None], axis=1)[:, 0]
    last = jax.random.categorical(sample_key, jnp.log(row))
    return lay_out(draft_tokens, num_accepted, last), num_accepted
