"""The calibrated rule as functions: of one step, and of the decoding loop with running estimates and their errors."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import Draft, KeyLike, SamplingParams, Verification
from specsamp_jax.rules import emit
from specsamp_jax.rules.calibrated import RowReport
from specsamp_jax.rules.verify import _verify


@allow_rank_promotion
def verify_calibrated(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
    log_normalizers: Float[Array, "B K"] | None = None,
    offset: int | float = 10.0,
) -> Verification:
    """Approximate, with a bound: the sigmoid rule of width 1 around each row's own log-normaliser.

    The sigmoid of `verify_sigmoid` with beta - alpha = 1 and alpha = log-normaliser + c, for the drafter's row and the
    target's. A rejected draft is replaced by a sample from max(0, p - q a), where a is the acceptance probability, a
    bonus token is one from p. With exact log-normalisers the law of each token is within exp(-c) of the target's in
    total variation. With an estimate that is off by e it is within 1 - 1/max(1, (1 + exp(-c)) exp(-e)): an estimate
    that is too high by log(1 + exp(-c)) or more costs drafts, and the law is exact.

    In a decoding loop `CalibratedRule` makes the estimates from earlier rows and reports the bound.

    Args:
      key: As in `verify`.
      target_logits: As in `verify`.
      draft: As in `verify`; without `log_normalizers` they are computed.
      sampling: As in `verify`. Greedy rows are exact.
      implementation: As in `verify`; there is no kernel.
      log_normalizers: Estimates of the logsumexp of the target's rows 0 to K - 1 after `sampling`; +inf rejects. None:
        the exact values.
      offset: c, at least 0.

    Returns:
      A `Verification`, as in `verify`. `accept_prob` is a; `log_probs` are the target's, exactly.

    Raises:
      ValueError: As in `verify`, or `log_normalizers` have another shape.
      NotImplementedError: As in `verify`.

    Source: after Wagner et al. (2024, arXiv 2406.11016); the bound is proved in docs/algorithms.md.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> target_logits = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5]]]))
      >>> draft = ss.Draft(jnp.array([[0]]), logits=jnp.log(jnp.array([[[0.9, 0.1]]])))
      >>> result = jax.jit(ss.verify_calibrated)(jax.random.key(0), target_logits, draft)
      >>> print(f"{result.accept_prob[0, 0]:.4f}, where p/q is {0.1 / 0.9:.4f}")
      0.1111, where p/q is 0.1111
    """
    options = {"log_normalizers": log_normalizers, "offset": offset, "implementation": implementation}
    return calibrated_with_report(key, target_logits, draft, sampling, **options)[0]


def calibrated_with_report(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None,
    *,
    log_normalizers: Float[Array, "B K"] | None,
    offset: int | float,
    implementation: str | None = None,
) -> tuple[Verification, RowReport]:
    """Like `verify_calibrated`; also returns the rows' log-normalisers, and errors and bounds of the estimates."""
    if not isinstance(offset, int | float) or not offset >= 0:
        raise ValueError(f"offset must be a Python number, at least 0: it is c in alpha = estimate + c; got {offset}.")
    row_data = {}
    if log_normalizers is not None:
        _checks.floating("log_normalizers", log_normalizers, "They are estimates of the target's logsumexp.")
        if isinstance(draft, Draft) and log_normalizers.shape != np.shape(draft.tokens):
            raise ValueError(
                f"log_normalizers must have shape [B, K] = {list(np.shape(draft.tokens))}, one per drafted token; got "
                f"{list(log_normalizers.shape)}. Is the bonus row among them?"
            )
        row_data = {"log_normalizers": jnp.asarray(log_normalizers)}
    return _verify("calibrated", {"offset": offset}, key, target_logits, draft, sampling, implementation, row_data)


class Calibration(NamedTuple):
    """State of `CalibratedRule`, and the errors of its estimates so far.

    Attributes:
      log_normalizer: Estimate of the target's log-normaliser; +inf before a row was read.
      num_read: Rows that the estimate is made of.
      num_decided: Drafts that were decided by an estimate.
      sum_bound: Sum over those drafts of the bound on the total variation. Its expectation bounds the total variation
        between the law of the whole text and the target's.
      max_bound: The largest of those bounds.
      sum_error: Sum over those drafts of the absolute error of the estimate, in nats.
    """

    log_normalizer: Float[Array, "B"]
    num_read: Int[Array, "B"]
    num_decided: Int[Array, "B"]
    sum_bound: Float[Array, "B"]
    max_bound: Float[Array, "B"]
    sum_error: Float[Array, "B"]


export.register_namedtuple_serialization(Calibration, serialized_name="specsamp_jax.Calibration")


@dataclasses.dataclass(frozen=True)
class CalibratedRule:
    """Approximate: the calibrated rule with running estimates, a `verify_fn` of `generate` that keeps a state.

    The target's log-normaliser is estimated from the rows that emitted the last token of earlier steps; the drafter's
    are exact. A sequence accepts no draft in its first step, when there is no estimate. On real models the estimate is
    off by 1 to 8 nats, so the text can be far from the target's: `Generation.verify_state` says how far.

    Attributes:
      offset: As in `verify_calibrated`.
      margin: Added to the estimate, in nats. More of it rejects more drafts, and keeps closer to the target.
      rate: Weight of a new row in the estimate, from the row on at which the mean of all rows would give it less.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> target = ss.Model(jnp.eye(5), bigrams, lambda batch_size, max_length: ())
      >>> models = {"target": target, "draft": target, "verify_fn": ss.CalibratedRule()}
      >>> text = ss.generate(jax.random.key(0), jnp.array([[1]]), **models, max_new_tokens=9)
      >>> state = text.verify_state
      >>> print(f"{state.max_bound[0]:.4f}, since all rows have one log-normaliser")
      0.0000, since all rows have one log-normaliser
    """

    offset: float = 10.0
    margin: float = 0.0
    rate: float = 0.1

    def __post_init__(self):
        for name, high, off in (
            ("offset", np.inf, "c"),
            ("margin", np.inf, "0 is off"),
            ("rate", 1, "0 is a plain mean"),
        ):
            value = vars(self)[name]
            if not isinstance(value, int | float):
                raise ValueError(f"CalibratedRule.{name} must be a Python number; got {value!r}.")
            _checks.real(f"CalibratedRule.{name}", value, 0, high, off)

    def init(self, batch_size: int) -> Calibration:
        """Returns the state before the first step."""
        zeros, counts = jnp.zeros((batch_size,), jnp.float32), jnp.zeros((batch_size,), jnp.int32)
        return Calibration(jnp.full((batch_size,), jnp.inf, jnp.float32), counts, counts, zeros, zeros, zeros)

    @allow_rank_promotion
    def __call__(
        self,
        key: KeyLike,
        target_logits: Float[Array, "B K1 V"],
        draft: Draft,
        sampling: SamplingParams | None,
        state: Calibration,
    ) -> tuple[Verification, Calibration]:
        """Returns the verification of a step, and the state after it."""
        estimate = jnp.broadcast_to((state.log_normalizer + self.margin)[:, None], draft.tokens.shape)
        result, report = calibrated_with_report(
            key, target_logits, draft, sampling, log_normalizers=estimate, offset=self.offset
        )
        return result, self._update(state, result, draft, report)

    def _update(self, state: Calibration, result: Verification, draft: Draft, report: RowReport) -> Calibration:
        num_drafted = emit.num_leading(draft.tokens >= 0)
        num_decided = jnp.where(state.num_read > 0, jnp.minimum(result.num_accepted + 1, num_drafted), 0)
        decided = jnp.arange(draft.tokens.shape[1]) < num_decided[:, None]
        bounds = jnp.where(decided, report.bound, 0).astype(jnp.float32)
        errors = jnp.where(decided, jnp.abs(report.error), 0).astype(jnp.float32)

        last = jnp.take_along_axis(report.log_normalizers, result.num_accepted[:, None], 1)[:, 0].astype(jnp.float32)
        first, readable = state.num_read == 0, jnp.isfinite(last)
        weight = jnp.maximum(1 / (state.num_read + 1), self.rate)
        moved = jnp.where(first, last, state.log_normalizer + weight * (last - state.log_normalizer))
        return Calibration(
            jnp.where(readable, moved, state.log_normalizer),
            state.num_read + readable.astype(jnp.int32),
            state.num_decided + num_decided,
            state.sum_bound + bounds.sum(1),
            jnp.maximum(state.max_bound, bounds.max(1, initial=0)),
            state.sum_error + errors.sum(1),
        )
