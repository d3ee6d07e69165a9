"""The usual way to write the verification step; Wagner et al. (2024, arXiv 2406.11016) call it the baseline."""

import jax
import jax.numpy as jnp
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
    num_draft = draft_tokens.shape[1]
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

    position = jnp.arange(num_draft + 1)
    drafts = jnp.pad(draft_tokens, ((0, 0), (0, 1)))
    tokens = jnp.where(position < num_accepted[:, None], drafts, -1)
    return jnp.where(position == num_accepted[:, None], last[:, None], tokens), num_accepted
