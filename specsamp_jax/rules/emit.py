"""Steps shared by the rules: valid drafts, the sample from the residual, packing of the result."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import DEGENERATE_DRAFT, DEGENERATE_TARGET, EMPTY_RESIDUAL, PAD_TOKEN, Verification
from specsamp_jax.sampling import draw
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.mesh_axes import cond


def draft_mask(tokens: Int[Array, "B K"]) -> Bool[Array, "B K"]:
    """True at the drafted tokens of each row: those before its first negative token."""
    return num_leading(tokens >= 0)[:, None] > jnp.arange(tokens.shape[1])


def num_leading(mask: Bool[Array, "B K"]) -> Int[Array, "B"]:
    """Number of True entries of each row before its first False."""
    num_columns = mask.shape[1]
    return jnp.where(mask, num_columns, jnp.arange(num_columns, dtype=jnp.int32)).min(1, initial=num_columns)


def exp(values: Float[Array, "B n"]) -> Float[Array, "B n"]:
    """`jnp.exp` behind barriers: fused, XLA's CPU backend would choose the exponential by the batch size."""
    return lax.optimization_barrier(jnp.exp(lax.optimization_barrier(values)))


def last_draft_row(
    drafter: dist.Rows, drafted: Bool[Array, "B K"], num_accepted: Int[Array, "B"]
) -> tuple[dist.Rows, Bool[Array, "B 1"]]:
    """The draft's row at which each sequence stopped, and whether the draft there was rejected (K > 0).

    A sequence that accepted all its drafts rejected none: its last token is sampled from p.
    """
    num_draft = drafted.shape[1]
    row = jnp.minimum(num_accepted, num_draft - 1)
    return drafter.take(row), (num_accepted < num_draft)[:, None] & dist.take_row(drafted, row)[:, None]


def sample_residual(
    residual: Float[Array, "B V"],
    fallback_fn: Callable[[], Float[Array, "B V"]],
    uniforms: Float[Array, "B 2"],
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Samples from the residual, or from `fallback_fn()` if the residual is zero; also returns where it is zero."""
    sums_of_residual = draw.tile_sums(residual)
    empty = sums_of_residual.sum(-1) == 0

    def patched():
        return jnp.where(empty[:, None], fallback_fn(), residual)

    # Two conditionals, so that the draws are in the program once.
    sums = cond(empty.any(), lambda: draw.tile_sums(patched()), lambda: sums_of_residual)
    tile = draw.sample_index(sums, uniforms[:, 0])
    weights = cond(empty.any(), lambda: draw.tile_weights(patched(), tile), lambda: draw.tile_weights(residual, tile))
    return draw.sample_in_tile(tile, weights, uniforms[:, 1]), empty


def pack(
    draft_tokens: Int[Array, "B K"],
    num_accepted: Int[Array, "B"],
    last_token: Int[Array, "B"],
    draft_log_probs: Float[Array, "B K"],
    last_log_prob: Float[Array, "B"],
    accept_prob: Float[Array, "B K"],
    status: Int[Array, "B"],
) -> Verification:
    """Packs a `Verification`: the accepted drafts, then the last token, then padding."""
    position = jnp.arange(draft_tokens.shape[1] + 1)
    accepted, last = position < num_accepted[:, None], position == num_accepted[:, None]

    def lay(drafts, final, padding):
        drafts = jnp.pad(drafts, ((0, 0), (0, 1)))
        return jnp.where(accepted, drafts, jnp.where(last, final[:, None].astype(drafts.dtype), padding))

    tokens = lay(draft_tokens, last_token, PAD_TOKEN)
    log_probs = lay(draft_log_probs, last_log_prob, 0)
    return Verification(tokens, num_accepted, log_probs, accept_prob, status)


def in_use(mask: Bool[Array, "B R"], num_accepted: Int[Array, "B"]) -> Bool[Array, "B"]:
    """Whether `mask` is True in any row from 0 to `num_accepted`, the row that emitted the last token."""
    return (mask & (jnp.arange(mask.shape[1]) <= num_accepted[:, None])).any(1)


def status(
    degenerate_target: Bool[Array, "B"], degenerate_draft: Bool[Array, "B"], empty: Bool[Array, "B"]
) -> Int[Array, "B"]:
    """The sum of the flags that hold."""
    flags = {DEGENERATE_TARGET: degenerate_target, DEGENERATE_DRAFT: degenerate_draft, EMPTY_RESIDUAL: empty}
    return sum((flag * holds.astype(jnp.int32) for flag, holds in flags.items()), jnp.int32(0))
