"""Attention of queries over keys and values, with a mask and optional soft-capping of the scores."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attend(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S KV D"],
    value: Float[Array, "B S KV D"],
    mask: Bool[Array, "#B 1 T S"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T N D"]:
    """Returns `softmax(scale * query key^T) value` over the unmasked keys; softmax and scores in float32.

    Args:
      query: Queries; N is a multiple of KV, and neighbours share a head of keys and values.
      key: Keys.
      value: Values.
      mask: True where a query may attend.
      scale: Multiplies the scores. None: `1 / sqrt(D)`.
      softcap: Scores s become `softcap * tanh(s / softcap)` before the mask (Gemma team, 2024,
        arXiv 2408.00118, section 2). None: no soft-capping.
    """
    # XLA's CPU backend does not support the float16 products that jax.nn requests.
    if softcap is None and query.dtype != jnp.float16:
        return jax.nn.dot_product_attention(query, key, value, mask=mask, scale=scale)
    groups = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
    scores = jnp.einsum("btkgd,bskd->bkgts", groups, key, preferred_element_type=jnp.float32)
    scores *= query.shape[3] ** -0.5 if scale is None else scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    # The lowest number, not -inf: a query that may attend nothing gets a mean, as above, and no NaN.
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)
