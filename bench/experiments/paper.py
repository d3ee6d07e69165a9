"""The baseline and the exact algorithm of Wagner et al. (2024, arXiv 2406.11016) in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from specsamp_jax._types import Uniforms


def finish(
    accept_prob: Float[Array, "B K"],
    tokens: Int[Array, "B K"],
    uniforms: Uniforms,
    row_fn: Callable[[Int[Array, "B"]], Float[Array, "B V"]],
) -> tuple[Int[Array, "B K1"], Int[Array, "B"]]:
    """Returns tokens and the number of accepted drafts; `row_fn` computes the weights of the emitting row."""
    num_accepted = jnp.cumprod(uniforms.accept < accept_prob, axis=1, dtype=jnp.int32).sum(1)
    running = jnp.cumsum(row_fn(num_accepted), axis=-1)
    last = (running <= uniforms.emit[:, :1] * running[:, -1:]).sum(-1)
    # u times the total can round up to the total.
    last = jnp.minimum(last, running.shape[-1] - 1)
    return lay_out(tokens, num_accepted, last), num_accepted


def lay_out(tokens: Int[Array, "B K"], num_accepted: Int[Array, "B"], last: Int[Array, "B"]) -> Int[Array, "B K1"]:
    """The accepted drafts of each row, then its last token, then -1."""
    position = jnp.arange(tokens.shape[1] + 1)
    emitted = jnp.where(position < num_accepted[:, None], jnp.pad(tokens, ((0, 0), (0, 1))), -1)
    return jnp.where(position == num_accepted[:, None], last[:, None], emitted)


def take(rows: Float[Array, "B R V"], row: Int[Array, "B"]) -> Float[Array, "B V"]:
    """One row of each sequence."""
    return jnp.take_along_axis(rows, row[:, None, None], axis=1)[:, 0]


def at(rows: Float[Array, "B R V"], tokens: Int[Array, "B K"]) -> Float[Array, "B K"]:
    """The entries of drafted tokens in the first K rows; any entry for a token below 0."""
    index = jnp.maximum(tokens, 0)[..., None]
    return jnp.take_along_axis(rows[:, : tokens.shape[1]], index, axis=-1)[..., 0]


def _probs_and_ratio(target, draft):
    p, q = (jax.nn.softmax(x.astype(jnp.float32), axis=-1) for x in (target, draft.logits))
    return p, q, jnp.minimum(1, at(p, draft.tokens) / at(q, draft.tokens))


def baseline(target, _, draft, __, uniforms):
    """Both softmaxes, the ratios, then the residual of the rejected row alone."""
    p, q, accept_prob = _probs_and_ratio(target, draft)
    q = jnp.pad(q, ((0, 0), (0, 1), (0, 0)))
    return finish(accept_prob, draft.tokens, uniforms, lambda row: jnp.maximum(take(p, row) - take(q, row), 0))


def exact(target, _, draft, __, uniforms):
    """tau, a = max(0, p - q) and b = sum a of all K rows at once; section 3.2."""
    p, q, accept_prob = _probs_and_ratio(target, draft)
    rows = exact_rows(p, q)
    return finish(accept_prob, draft.tokens, uniforms, lambda row: take(rows, row))


def exact_rows(p: Float[Array, "B K1 V"], q: Float[Array, "B K V"]) -> Float[Array, "B K1 V"]:
    """The normalised residuals a / b of all K rows, then p of the last; section 3.2. The compiler fuses them."""
    a = jnp.maximum(p[:, :-1] - q, 0)
    b = a.sum(-1, keepdims=True)
    # Without a residual the row emits from p.
    residual = jnp.where(b > 0, a / b, p[:, :-1])
    return jnp.concatenate([residual, p[:, -1:]], axis=1)


def baseline_rows(p: Float[Array, "B K1 V"], q: Float[Array, "B K V"]) -> Float[Array, "B K1 V"]:
    """Like `exact_rows`, each intermediate written to memory before the next, as operations run one by one do."""
    p, q = lax.optimization_barrier((p, q))
    difference = lax.optimization_barrier(p[:, :-1] - q)
    a = lax.optimization_barrier(jnp.maximum(difference, 0))
    b = lax.optimization_barrier(a.sum(-1, keepdims=True))
    residual = lax.optimization_barrier(jnp.where(b > 0, a / b, p[:, :-1]))
    return jnp.concatenate([residual, p[:, -1:]], axis=1)
