"""GPU kernels with the signatures of the cores: equal arrays and uniforms give equal tokens."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import mosaic
from specsamp_jax._types import TILE, Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.sampling import kernels
from specsamp_jax.sampling import rows as dist

if TYPE_CHECKING or mosaic.WHY_MISSING is None:
    from pallas_kernels import sigmoid as sigmoid_kernel
    from pallas_kernels import token as token_kernel
    from pallas_kernels import token_early_exit

MAX_VOCABULARY = 2_000_000
"""Limit of the vocabulary size: one block searches the sums of all its tiles at once."""


def why_not(target_logits: Float[Array, "B K1 V"], draft: Draft) -> str | None:
    """The requirement of the kernels that these arrays do not meet, whatever the platform; None if there is none."""
    if not all(isinstance(size, int) for size in target_logits.shape):
        return f"shapes that are numbers while the program is traced; got {list(target_logits.shape)}"
    for name, logits in (("target_logits", target_logits), ("draft.logits", draft.logits)):
        reason = None if logits is None else kernels.why_not(name, logits)
        if reason is not None:
            return reason
    vocab_size = target_logits.shape[-1]
    if vocab_size > MAX_VOCABULARY:
        return f"a vocabulary of at most {MAX_VOCABULARY}; got {vocab_size}"
    if draft.tokens.shape[1] > sizes.MAX_DRAFTS:
        return f"at most {sizes.MAX_DRAFTS} drafts; got {draft.tokens.shape[1]}"
    return None


def choose_token_kernel(target_logits: Float[Array, "B K1 V"], draft: Draft) -> Callable[..., Verification]:
    """The token rule's kernel for these arrays: two launches, or one with early exit."""
    batch_size, num_rows, vocab_size = target_logits.shape
    reads_draft = draft.logits is not None and draft.log_normalizers is None
    early = sizes.exits_early(batch_size, num_rows - 1, max(vocab_size, TILE), reads_draft)
    return token_early_exit.verify_token if early else token_kernel.verify_token


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
    *,
    kernel: Callable[..., Verification] | None = None,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the token rule's kernel; equal to `token.verify_token` up to rounding.

    `log_probs` and `accept_prob` use the hardware's exponential and logarithm, accurate to about 1e-6. `kernel` is
    `choose_token_kernel` if None, and `config` chosen by the kernel.
    """
    kernel = kernel or choose_token_kernel(target_logits, draft)
    return kernel(
        kernels.at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else kernels.at_least_a_tile(draft.logits),
        draft_filter,
        draft.log_normalizers,
        _in_vocabulary(draft.tokens, target_logits),
        uniforms,
        config=config,
    )


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
    *,
    alpha: int | float,
    beta: int | float,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the sigmoid rule's kernel; equal to `sigmoid.verify_sigmoid` up to rounding.

    If a target row may be greedy, `sigmoid.verify_sigmoid` runs instead of the kernel. `log_probs` are computed by
    XLA, which removes them, with the pass over all rows that they need, if they are unused under `jit`.
    """
    if target_filter.greedy is not None:
        core = sigmoid_rule.verify_sigmoid
        return core(target_logits, target_filter, draft, draft_filter, uniforms, alpha=alpha, beta=beta)
    tokens = draft.tokens
    result = sigmoid_kernel.verify_sigmoid(
        kernels.at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else kernels.at_least_a_tile(draft.logits),
        draft_filter,
        _in_vocabulary(tokens, target_logits),
        uniforms,
        alpha=alpha,
        beta=beta,
        config=config,
    )
    target, num_accepted = dist.target_rows(target_logits, target_filter), result.num_accepted
    last_token = jnp.take_along_axis(result.tokens, num_accepted[:, None], axis=1)
    log_probs = emit.pack(
        tokens,
        num_accepted,
        last_token[:, 0],
        dist.log_prob(target.first(tokens.shape[1]), tokens),
        dist.log_prob(target.take(num_accepted), last_token)[:, 0],
        result.accept_prob,
        result.status,
    ).log_probs
    return Verification(log_probs=log_probs, **result._asdict())


def _in_vocabulary(tokens: Int[Array, "B K"], target_logits: Float[Array, "B K1 V"]) -> Int[Array, "B K"]:
    """The tokens, those beyond the vocabulary moved beyond the tile up to which a smaller one is padded."""
    return jnp.where(tokens < target_logits.shape[-1], tokens, jnp.iinfo(jnp.int32).max)
