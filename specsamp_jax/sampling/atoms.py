"""Acceptance probability, residual and acceptance rate as pure functions of logits, without a key."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax.sampling.reduce import wide


def accept_prob(
    target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"], tokens: Int[Array, "*b"]
) -> Float[Array, "*b"]:
    """min(1, p(x)/q(x)) at each drafted token x.

    0 if p(x) is 0 or if the token is not in [0, V); 1 if only q(x) is 0.

    Raises:
      ValueError: The shapes do not fit, or the logits are of no floating-point type.

    Source: Leviathan et al. (2023, arXiv 2211.17192, section 2.3).

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> p, q = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
      >>> ss.accept_prob(p, q, jnp.array(0)).round(2).item()
      0.5
    """
    _checks.pair(target_logits, draft_logits)
    if jnp.shape(tokens) != target_logits.shape[:-1]:
        raise ValueError(
            f"tokens must have the logits' shape without V, {list(target_logits.shape[:-1])}; "
            f"got {list(jnp.shape(tokens))}."
        )
    log_p, log_q = (_log_prob(logits, tokens) for logits in (target_logits, draft_logits))
    return jnp.where(log_p > -jnp.inf, jnp.exp(jnp.minimum(log_p - log_q, 0)), 0)


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
    # The gradient of `where` evaluates both branches: the branch not taken must be finite too.
    gap = jnp.where(above & (log_q > -jnp.inf), log_q - log_p, -1.0)
    shrunk = log_p + jnp.where(log_q > -jnp.inf, jnp.log(-jnp.expm1(gap)), 0)
    return jnp.where(above, shrunk, -jnp.inf)


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


def expected_num_tokens(acceptance_rate: ArrayLike, num_draft: ArrayLike) -> Float[Array, "..."]:
    """Tokens that one step emits on average, (1 - a**(K+1))/(1 - a); K + 1 at a = 1.

    Args:
      acceptance_rate: a in [0, 1], taken as equal and independent from position to position.
      num_draft: K, drafted tokens per step.

    Source: Leviathan et al. (2023, arXiv 2211.17192, equation 1).

    Example:
      >>> import specsamp_jax as ss
      >>> ss.expected_num_tokens(0.5, 2).item()
      1.75
    """
    rate = jnp.asarray(acceptance_rate, jnp.promote_types(jnp.result_type(acceptance_rate), jnp.float32))
    always = rate == 1
    safe = jnp.where(always, 0, rate)
    num_tokens = jnp.asarray(num_draft) + 1
    # 1 - a**(K+1) cancels near a = 1, so it is computed with expm1 and log1p; 1 - a is exact there.
    return jnp.where(always, num_tokens, -jnp.expm1(num_tokens * jnp.log1p(safe - 1)) / (1 - safe))


def _log_prob(logits: Float[Array, "*b V"], tokens: Int[Array, "*b"]) -> Float[Array, "*b"]:
    vocab_size = logits.shape[-1]
    index = jnp.clip(tokens, 0, vocab_size - 1)[..., None]
    value = jnp.take_along_axis(wide(logits), index, axis=-1)[..., 0] - jax.nn.logsumexp(wide(logits), axis=-1)
    return jnp.where((tokens >= 0) & (tokens < vocab_size), value, -jnp.inf)
