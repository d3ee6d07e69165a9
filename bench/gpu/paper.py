"""The baseline and the exact algorithm of Wagner et al. (2024, arXiv 2406.11016) in plain JAX."""

import jax
import jax.numpy as jnp


def _finish(accept_prob, num_drafted_tokens, uniforms, row_fn):
    """Returns tokens and the number of accepted drafts; `row_fn` computes the weights of the emitting row."""
    tokens = num_drafted_tokens
    num_accepted = jnp.cumprod(uniforms.accept < accept_prob, axis=1, dtype=jnp.int32).sum(1)
    running = jnp.cumsum(row_fn(num_accepted), axis=-1)
    last = (running <= uniforms.emit[:, :1] * running[:, -1:]).sum(-1)
    position = jnp.arange(tokens.shape[1] + 1)
    emitted = jnp.where(position < num_accepted[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), -1)
    return jnp.where(position == num_accepted[:, None], last[:, None], emitted), num_accepted


def _take(rows, row):
    return jnp.take_along_axis(rows, row[:, None, None], axis=1)[:, 0]


def _probs_and_ratio(target, draft):
    p, q = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (target, draft.logits))
    index = draft.tokens[..., None]
    ratio = jnp.take_along_axis(p[:, :-1], index, axis=-1) / jnp.take_along_axis(q, index, axis=-1)
    return p, q, jnp.minimum(1, ratio[..., 0])


def baseline(target, _, draft, __, uniforms):
    """Both softmaxes, the ratios, then the residual of the rejected row alone."""
    p, q, accept_prob = _probs_and_ratio(target, draft)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    return _finish(accept_prob, draft.tokens, uniforms, lambda row: jnp.maximum(_take(p, row) - _take(q, row), 0))


def exact(target, _, draft, __, uniforms):
    """tau, a = max(0, p - q) and b = sum a of all K rows at once; section 3.2."""
    p, q, accept_prob = _probs_and_ratio(target, draft)
    a = jnp.maximum(p[:, :-1] - q, 0)
    residual = a / a.sum(-1, keepdims=True)
    rows = jnp.concatenate([residual, p[:, -1:]], axis=1)
    return _finish(accept_prob, draft.tokens, uniforms, lambda row: _take(rows, row))
