"""The GPU kernels behind the signatures of the cores: same arrays and uniforms in, same tokens out."""

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from specsamp_jax._types import TILE, Draft, Filter, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.sampling import rows as dist

MAX_BATCH = 65_535
"""What a grid may be in its last direction."""

MAX_VOCABULARY = 2_000_000
"""The sums of its tiles are searched at once."""


def why_not(target_logits: Float[Array, "B K1 V"], draft: Draft) -> str | None:
    """What keeps the kernels from taking these arrays, whatever the platform; None where nothing does."""
    for name, logits in (("target_logits", target_logits), ("draft.logits", draft.logits)):
        if logits is None:
            continue
        if logits.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
            return f"{name} of bfloat16, float16 or float32; got {logits.dtype}"
        if logits.size >= 2**31 - 2**16:
            return f"{name} of fewer than 2**31 - 2**16 elements; got {logits.size}"
    batch_size, _, vocab_size = target_logits.shape
    if batch_size > MAX_BATCH:
        return f"at most {MAX_BATCH} sequences; got {batch_size}"
    if vocab_size > MAX_VOCABULARY:
        return f"a vocabulary of at most {MAX_VOCABULARY}; got {vocab_size}"
    if draft.tokens.shape[1] > pallas_kernels.MAX_DRAFTS:
        return f"at most {pallas_kernels.MAX_DRAFTS} drafts; got {draft.tokens.shape[1]}"
    return None


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    uniforms: Uniforms,
) -> Verification:
    """The token rule in one launch or two; see `token.verify_token`, which it equals up to rounding.

    `log_probs` and `accept_prob` come from the hardware's exponential and logarithm, good to about 1e-6.
    """
    return pallas_kernels.verify_token(
        _at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else _at_least_a_tile(draft.logits),
        draft_filter,
        draft.log_normalizers,
        draft.tokens,
        uniforms,
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
) -> Verification:
    """The sigmoid rule in one kernel; see `sigmoid.verify_sigmoid`, which it equals up to rounding.

    Where a target row may be greedy it is the core itself. `log_probs` are the core's: XLA drops them, and
    the pass over all rows that they take, where they are not used.
    """
    if target_filter.greedy is not None:
        core = sigmoid_rule.verify_sigmoid
        return core(target_logits, target_filter, draft, draft_filter, uniforms, alpha=alpha, beta=beta)
    tokens = draft.tokens
    result = pallas_kernels.verify_sigmoid(
        _at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else _at_least_a_tile(draft.logits),
        draft_filter,
        tokens,
        uniforms,
        alpha=alpha,
        beta=beta,
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


def _at_least_a_tile(logits: Float[Array, "B R V"]) -> Float[Array, "B R W"]:
    """The logits themselves, or, of a vocabulary smaller than a tile, with -inf up to one."""
    if logits.shape[-1] >= TILE:
        return logits
    missing = TILE - logits.shape[-1]
    return jnp.pad(logits, ((0, 0), (0, 0), (0, missing)), constant_values=-jnp.inf)
