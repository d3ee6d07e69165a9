"""The rules that the experiments compare, as `verify_fn`s with the signature of `specsamp_jax.verify`.

`sigmoid as released` is an oracle: what the paper's published program computes, written from a description of it. The
library has no such rule.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import paper
from jaxtyping import Array, Float, Int

import specsamp_jax as ss
from specsamp_jax._types import KeyLike
from specsamp_jax.decoding.step import VerifyFn
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.filters import make_filter
from specsamp_jax.sampling.reduce import wide
from specsamp_jax.sampling.rows import first_largest

WIDTHS = 2e3, 2e4, 2e5
"""beta - alpha of the sigmoid as described; 2e4 is the released one."""

RELEASED_ALPHA, RELEASED_BETA, RELEASED_FLOOR, RELEASED_SUM_START = -1e4, 1e4, 1e-5, 1e-6


class Rows(NamedTuple):
    """Acceptance and weights that a rule computes from filtered logits.

    Attributes:
      accept_prob: Probability of accepting each draft.
      weights: Weights of the token that each row emits.
    """

    accept_prob: Float[Array, "B K"]
    weights: Float[Array, "B K1 V"]


def dense(
    logits: Float[Array, "B R V"], sampling: ss.SamplingParams | None, certain: Int[Array, "B R"]
) -> Float[Array, "B R V"]:
    """The filtered logits in full, -inf where filtered out; a greedy row has 0 at its certain token, -inf elsewhere."""
    filter = make_filter(logits, sampling)
    z = wide(logits)
    if filter.cutoff is not None:
        z = jnp.where(z >= filter.cutoff[..., None], z, -jnp.inf)
    if filter.scale is not None:
        z = z * filter.scale[:, None, None]
    if filter.greedy is not None:
        z = jnp.where(filter.greedy[:, None, None], one_hot(certain, z.shape[-1]), z)
    return z


def one_hot(tokens: Int[Array, "B R"], vocab_size: int) -> Float[Array, "B R V"]:
    """Logits with all probability on one token."""
    return jnp.where(jnp.arange(vocab_size) == tokens[..., None], 0.0, -jnp.inf)


def _rule(core: Callable[[Array, Array, Array], Rows]) -> Callable[..., ss.Verification]:
    """The `verify_fn` of a rule that reads whole rows of filtered logits."""

    @functools.wraps(core)
    def verify_fn(
        key: KeyLike,
        target_logits: Float[Array, "B K1 V"],
        draft: ss.Draft,
        sampling: ss.SamplingParams | None = None,
        *,
        implementation: str | None = None,
    ) -> ss.Verification:
        del implementation
        draft_sampling = draft.sampling
        target_logits, draft = jax.tree.map(jnp.asarray, (target_logits, draft._replace(sampling=None)))
        tokens, (batch_size, _, vocab_size) = draft.tokens, target_logits.shape
        certain = jnp.stack([first_largest(row) for row in jnp.moveaxis(target_logits, 1, 0)], axis=1)
        z_p = dense(target_logits, sampling, certain)
        z_q = one_hot(tokens, vocab_size) if draft.logits is None else dense(draft.logits, draft_sampling, tokens)
        rows = core(z_p, z_q, tokens)
        accept_prob = jnp.where(tokens >= 0, rows.accept_prob, 0)
        uniforms = streams.verification_uniforms(streams.row_keys(key, batch_size), tokens.shape[1])
        emitted, num_accepted = paper.finish(accept_prob, tokens, uniforms, lambda row: paper.take(rows.weights, row))
        nothing = jnp.zeros(emitted.shape, jnp.float32)
        return ss.Verification(emitted, num_accepted, nothing, accept_prob, jnp.zeros((batch_size,), jnp.int32))

    return verify_fn


def _probs(z_p: Array, z_q: Array, tokens: Array) -> tuple[Array, Array, Array]:
    """p, q (0 in rows without a draft) and min(1, p/q)."""
    p = jax.nn.softmax(z_p, axis=-1)
    q = jnp.where(tokens[..., None] >= 0, jax.nn.softmax(z_q, axis=-1), 0)
    return p, q, jnp.minimum(1, paper.at(p, tokens) / paper.at(q, tokens))


@_rule
def verify_baseline(z_p: Array, z_q: Array, tokens: Array) -> Rows:
    """The paper's baseline: both softmaxes, the ratios and the residuals of all rows, each written to memory."""
    p, q, ratio = _probs(z_p, z_q, tokens)
    return Rows(ratio, paper.baseline_rows(p, q))


@_rule
def verify_exact(z_p: Array, z_q: Array, tokens: Array) -> Rows:
    """The paper's exact method: tau, a and b of all rows, in one program that the compiler fuses."""
    p, q, ratio = _probs(z_p, z_q, tokens)
    return Rows(ratio, paper.exact_rows(p, q))


@_rule
def verify_released(z_p: Array, z_q: Array, tokens: Array) -> Rows:
    """The sigmoid as released: clipped scores, floored residual, and a bonus row that is not transformed."""
    drafted = tokens[..., None] >= 0
    s_p, s_q = _released_scores(z_p[:, :-1]), _released_scores(z_q)
    a = jnp.maximum(s_p - s_q, 0)
    residual = jnp.maximum(a / (RELEASED_SUM_START + a.sum(-1, keepdims=True)), RELEASED_FLOOR)
    bonus = jnp.maximum(z_p, RELEASED_FLOOR)
    weights = jnp.concatenate([jnp.where(drafted, residual, bonus[:, :-1]), bonus[:, -1:]], axis=1)
    return Rows(jnp.minimum(1, paper.at(s_p, tokens) / paper.at(s_q, tokens)), weights)


def _released_scores(z: Array) -> Array:
    scores = jax.nn.sigmoid((z - RELEASED_ALPHA) / (RELEASED_BETA - RELEASED_ALPHA))
    return jnp.where(z < RELEASED_ALPHA, 0, jnp.where(z > RELEASED_BETA, 1, scores))


def _sigmoid(width: float) -> Callable[..., ss.Verification]:
    return functools.partial(ss.verify_sigmoid, alpha=-width / 2, beta=width / 2)


CALIBRATED = {"calibrated": ss.CalibratedRule(), "calibrated +4": ss.CalibratedRule(margin=4.0)}
"""The calibrated sigmoid, which keeps a state; with a margin of 4 nats it rejects more and is closer to the target."""

FUNCTIONS: dict[str, Callable[..., ss.Verification]] = {
    "baseline": verify_baseline,
    "exact": verify_exact,
    "ours": ss.verify,
    "block": ss.verify_block,
    "coupled": ss.verify_coupled,
    **{f"sigmoid {width:.0e}".replace("+0", ""): _sigmoid(width) for width in WIDTHS},
    "sigmoid as released": verify_released,
}
"""The rules without a state, by their names in the tables."""

VERIFY_FNS: dict[str, VerifyFn] = {**FUNCTIONS, **CALIBRATED}
"""Each rule by its name in the tables."""

EXACT = "baseline", "exact", "ours", "block", "coupled"
"""The rules that sample the target's law."""
