"""Calls of the GPU kernels of the rules, with the signatures of the plain JAX cores.

A kernel returns the tokens that the core returns for equal arrays and uniforms, up to rounding. Modules of kernels are
imported in functions; see `pallas_kernels.mosaic`.
"""

import functools
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import config as sizes
from pallas_kernels.random import Draws
from specsamp_jax._types import TILE, Draft, Filter, SamplingParams, Uniforms, Verification
from specsamp_jax.rules import emit
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.sampling import kernels, streams
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.streams import Purpose

MAX_SIGMOID_NOISE = 16
"""Maximum number of drafts for which the sigmoid kernel computes the uniforms itself, in code unrolled over drafts."""

MAX_VOCABULARY = 2_000_000
"""Maximum vocabulary size: one block computes the running sums of all tiles of a row in its shared memory."""


def why_not(target_logits: Float[Array, "B K1 V"], draft: Draft) -> str | None:
    """The requirement of the kernels that these arrays do not meet, or None. Does not check the platform."""
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
    """Chooses the kernel of the token rule for these arrays: in two launches, or in three with early exit."""
    from pallas_kernels import token, token_early_exit

    batch_size, num_rows, vocab_size = target_logits.shape
    read = (
        [target_logits] if draft.logits is None or draft.log_normalizers is not None else [target_logits, draft.logits]
    )
    early = sizes.exits_early(batch_size, num_rows - 1, max(vocab_size, TILE), [each.dtype for each in read])
    return token_early_exit.verify_token if early else token.verify_token


def verify_token_from_keys(
    words: UInt32[Array, "*keys 2"],
    target_logits: Float[Array, "B K1 V"],
    sampling: SamplingParams | None,
    draft: Draft,
    draft_sampling: SamplingParams | None,
) -> Verification:
    """Verifies drafts by the token rule; the kernels compute the uniforms from `words`, the words of the keys.

    Takes two launches, or three with early exit. Filters of a vocabulary that `slices.supports` excludes need more.
    """
    from pallas_kernels import token_filtered

    arguments = words, target_logits, sampling, draft, draft_sampling
    return _verify_from_keys(*arguments, token_filtered.verify_token, verify_token)


def verify_block_from_keys(
    words: UInt32[Array, "*keys 2"],
    target_logits: Float[Array, "B K1 V"],
    sampling: SamplingParams | None,
    draft: Draft,
    draft_sampling: SamplingParams | None,
) -> Verification:
    """Verifies drafts by the block rule, in two launches or, where these leave no sums of tiles, three or four."""
    from pallas_kernels import block, token_filtered

    arguments = words, target_logits, sampling, draft, draft_sampling
    filtered = block.verify_filtered_block if draft.tokens.shape[1] else token_filtered.verify_token
    return _verify_from_keys(*arguments, filtered, verify_block)


def _verify_from_keys(words, target_logits, sampling, draft, draft_sampling, filtered_kernel, verify_fn):
    """Verifies by a kernel that finds the cutoffs of filters, or by `verify_fn` where there are none."""
    from pallas_kernels import slices

    noise = kernels.noise(words, Purpose.VERIFY)
    filtered = kernels.needs_cutoff(sampling) or (draft.logits is not None and kernels.needs_cutoff(draft_sampling))
    if filtered and slices.supports(target_logits.shape[-1]):
        limits = kernels.limits(sampling), kernels.limits(draft_sampling)
        return _call(filtered_kernel, target_logits, limits[0], draft, limits[1], noise)
    filters = _make_filters(target_logits, sampling, draft, draft_sampling)
    return verify_fn(target_logits, filters[0], draft, filters[1], noise)


def verify_sigmoid_from_keys(
    words: UInt32[Array, "*keys 2"],
    target_logits: Float[Array, "B K1 V"],
    sampling: SamplingParams | None,
    draft: Draft,
    draft_sampling: SamplingParams | None,
    *,
    alpha: int | float,
    beta: int | float,
) -> Verification:
    """Verifies drafts by the sigmoid rule, with uniforms that are computed from `words`, the words of the keys."""
    filters = _make_filters(target_logits, sampling, draft, draft_sampling)
    draws = kernels.noise(words, Purpose.VERIFY)
    if draft.tokens.shape[1] > MAX_SIGMOID_NOISE or filters[0].greedy is not None:
        keys = streams.row_keys(words, target_logits.shape[0])
        draws = streams.verification_uniforms(keys, draft.tokens.shape[1])
    return verify_sigmoid(target_logits, filters[0], draft, filters[1], draws, alpha=alpha, beta=beta)


def _make_filters(target_logits, sampling, draft, draft_sampling) -> list[Filter]:
    """The filters of the target and of the draft."""
    draft_logits = target_logits[:, :0] if draft.logits is None else draft.logits
    return kernels.make_filters((target_logits, sampling), (draft_logits, draft_sampling))


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    draws: Draws,
    *,
    kernel: Callable[..., Verification] | None = None,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the token rule's kernel; equal to `token.verify_token` up to rounding.

    `log_probs` and `accept_prob` use the hardware's exponential and logarithm, accurate to about 1e-6. If `kernel` is
    None, `choose_token_kernel` chooses it. If `config` is None, the kernel chooses it.
    """
    kernel = kernel or choose_token_kernel(target_logits, draft)
    return _call(functools.partial(kernel, config=config), target_logits, target_filter, draft, draft_filter, draws)


def verify_block(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    draws: Draws,
    *,
    kernel: Callable[..., Verification] | None = None,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the block rule's kernel; equal to `block.verify_block` up to rounding.

    Likewise as `verify_token`, whose kernel serves where nothing is drafted.
    """
    from pallas_kernels import block

    if draft.tokens.shape[1] == 0:
        return verify_token(target_logits, target_filter, draft, draft_filter, draws, config=config)
    kernel = kernel or block.verify_block
    return _call(functools.partial(kernel, config=config), target_logits, target_filter, draft, draft_filter, draws)


def _call(kernel, target_logits, target_filter, draft, draft_filter, draws) -> Verification:
    """Calls a kernel with rows of at least a tile; filters are those that it takes, `Filter` or `Limits`."""
    return kernel(
        kernels.at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else kernels.at_least_a_tile(draft.logits),
        draft_filter,
        draft.log_normalizers,
        _in_vocabulary(draft.tokens, target_logits),
        draws,
    )


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft: Draft,
    draft_filter: Filter,
    draws: Draws,
    *,
    alpha: int | float,
    beta: int | float,
    config: sizes.Config | None = None,
) -> Verification:
    """Returns the verification by the sigmoid rule's kernel; equal to `sigmoid.verify_sigmoid` up to rounding.

    If a target row can be greedy, `sigmoid.verify_sigmoid` runs instead of the kernel. XLA computes `log_probs` after
    the kernel, in one more pass over all rows. Under `jit` it removes that pass if `log_probs` are unused.
    """
    from pallas_kernels import sigmoid

    if target_filter.greedy is not None:
        assert isinstance(draws, Uniforms)
        core = sigmoid_rule.verify_sigmoid
        return core(target_logits, target_filter, draft, draft_filter, draws, alpha=alpha, beta=beta)
    tokens = draft.tokens
    result = sigmoid.verify_sigmoid(
        kernels.at_least_a_tile(target_logits),
        target_filter,
        None if draft.logits is None else kernels.at_least_a_tile(draft.logits),
        draft_filter,
        _in_vocabulary(tokens, target_logits),
        draws,
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
    """Replaces tokens from V on by the largest int32 if V is padded to a tile, so that none is in the padding."""
    vocab_size = target_logits.shape[-1]
    return tokens if vocab_size >= TILE else jnp.where(tokens < vocab_size, tokens, jnp.iinfo(jnp.int32).max)
