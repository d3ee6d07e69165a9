"""Acceptance probability, residual and acceptance rate as pure functions of logits, without a key."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax.sampling.reduce import wide
from specsamp_jax.sampling.rows import log_ratio


@allow_rank_promotion
def accept_prob(
    target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"], tokens: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """min(1, p(x)/q(x)) at each drafted token x.

    0 if p(x) is 0 or if the token is not in [0, V); 1 if only q(x) is 0.

    Raises:
      ValueError: The shapes do not fit, the logits are of no floating-point type, or the tokens of no integer type.

    Source: Leviathan et al. (2023, arXiv 2211.17192, section 2.3).

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> p, q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
      >>> ss.accept_prob(p, q, jnp.array(0)).round(2).item()
      0.5
    """
    _checks.pair(target_logits, draft_logits)
    ids = np.asarray(tokens) if isinstance(tokens, int) else tokens
    _checks.integers("tokens", ids)
    if ids.shape != target_logits.shape[:-1]:
        raise ValueError(
            f"tokens must have the logits' shape without V, {list(target_logits.shape[:-1])}; got {list(ids.shape)}."
        )
    log_p, log_q = (_log_prob(logits, ids) for logits in (target_logits, draft_logits))
    return jnp.exp(jnp.minimum(log_ratio(log_p, log_q), 0))


@allow_rank_promotion
def residual_logits(target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"]) -> Float[Array, "*b V"]:
    """Log max(0, p - q): unnormalised logits of the distribution that follows a rejection, -inf where p <= q.

    If p equals q no draft is ever rejected, and the whole row is -inf. The difference is computed as
    `log p + log(1 - q/p)`, which is precise for tokens with tiny probabilities.

    Raises:
      ValueError: The shapes do not fit, or the logits are of no floating-point type.

    Source: Leviathan et al. (2023, arXiv 2211.17192, section 2.3).

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> p, q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
      >>> jnp.exp(ss.residual_logits(p, q)).round(2).tolist()
      [0.0, 0.25]
    """
    _checks.pair(target_logits, draft_logits)
    log_p, log_q = (jax.nn.log_softmax(wide(logits)) for logits in (target_logits, draft_logits))
    above = log_p > log_q
    # The gradient of `where` evaluates both branches: the branch not taken must be finite too, and -inf - -inf is NaN.
    gap = jnp.where(above & (log_q > -jnp.inf), log_q - jnp.where(above, log_p, 0), -1.0)
    shrunk = log_p + jnp.where(log_q > -jnp.inf, jnp.log(-jnp.expm1(gap)), 0)
    return jnp.where(above, shrunk, -jnp.inf)


@allow_rank_promotion
def acceptance_rate(target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """The probability that a token drafted from q is accepted, sum min(p, q): one minus their total variation.

    Raises:
      ValueError: The shapes do not fit, or the logits are of no floating-point type.

    Source: Leviathan et al. (2023, arXiv 2211.17192, theorem 3.5).

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> p, q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
      >>> ss.acceptance_rate(p, q).round(2).item()
      0.75
    """
    _checks.pair(target_logits, draft_logits)
    return jnp.minimum(jax.nn.softmax(wide(target_logits)), jax.nn.softmax(wide(draft_logits))).sum(-1)


@allow_rank_promotion
def expected_num_tokens(acceptance_rate: ArrayLike, num_draft: ArrayLike) -> Float[Array, "..."]:
    """Tokens that one step emits on average, (1 - a**(K+1))/(1 - a); K + 1 at a = 1.

    Args:
      acceptance_rate: a in [0, 1], taken as equal and independent from position to position.
      num_draft: K, drafted tokens per step.

    Raises:
      ValueError: An argument is no number, or no array of numbers, or out of its range.

    Source: Leviathan et al. (2023, arXiv 2211.17192, equation 1).

    Example:
      >>> import specsamp_jax as ss
      >>> ss.expected_num_tokens(0.5, 2).item()
      1.75
    """
    for name, value, high in (("acceptance_rate", acceptance_rate, 1), ("num_draft", num_draft, _checks.LARGEST)):
        _checks.numbers(name, value)
        _checks.at_most(name, value, high, "per draft" if high == 1 else "drafts per step")
    rate = jnp.asarray(acceptance_rate, jnp.promote_types(jnp.result_type(acceptance_rate), jnp.float32))
    always = rate == 1
    safe = jnp.where(always, 0, rate)
    num_tokens = (jnp.asarray(num_draft) + 1).astype(rate.dtype)
    # 1 - a**(K+1) cancels near a = 1, so it is computed with expm1 and log1p; 1 - a is exact there.
    return jnp.where(always, num_tokens, -jnp.expm1(num_tokens * jnp.log1p(safe - 1)) / (1 - safe))


def _log_prob(logits: Float[Array, "*b V"], tokens: Int[Array | np.ndarray, "*b"]) -> Float[Array, "*b"]:
    vocab_size = logits.shape[-1]
    # Not a gather, which JAX refuses where the vocabulary is sharded over explicit axes.
    at_token = jnp.arange(vocab_size) == _checks.int32(tokens)[..., None]
    value = jnp.where(at_token, wide(logits), 0).sum(-1) - jax.nn.logsumexp(wide(logits), axis=-1)
    return jnp.where((tokens >= 0) & (tokens < vocab_size), value, -jnp.inf)
