"""Types, flags and constants that the kernels and the plain JAX cores share, declared once."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

TILE = 1024
"""Vocabulary entries per tile. Two-level sampling picks a tile by the sum of its weights, then a token in it."""

PAD_TOKEN = -1
"""Padding of token arrays."""

DEGENERATE_TARGET = 1
"""Flag of `Verification.status`: a target row in use holds NaN or +inf, or keeps no token."""

DEGENERATE_DRAFT = 2
"""Flag of `Verification.status`: a draft row in use holds NaN or +inf, keeps no token, or drops the drafted one."""

EMPTY_RESIDUAL = 4
"""Flag of `Verification.status`: a draft was rejected in a row in which max(p - q, 0) is exactly zero."""

EMIT_DRAWS = 2
"""Number of uniforms that sample a token. They are a row's first draws, so no draw depends on the number of drafts."""

LARGEST_LOG_NORMALIZER = 128.0
"""A float32 logsumexp above this has a rounding error above 2**-17, as do its log-probabilities: it is recomputed."""

ROUNDS = 64
"""Number of rounds in which the block rule looks for the row to stop at, before it searches by the sums of rows."""


class Filter(NamedTuple):
    """`SamplingParams` as a scale and a cutoff per row of logits; a field that is None applies to no row.

    Attributes:
      scale: Multiplies the logits, 1/temperature; 1 for greedy rows. None: 1.
      cutoff: The smallest kept logit, before scaling, in the dtype of the arithmetic. None: all are kept.
      greedy: True for rows with all probability on the first largest logit. None: no row is greedy.
    """

    scale: Float[Array, "B"] | None = None
    cutoff: Float[Array, "B R"] | None = None
    greedy: Bool[Array, "B"] | None = None


class Uniforms(NamedTuple):
    """The random draws of one verification: uniforms in [0, 1).

    Attributes:
      accept: One per draft position.
      emit: Two for the residual or bonus token: its tile, then its position in the tile.
      rounds: Three per round of the block rule: a coin, then the tile and the position in the tile of a token.
        None: no rounds.
    """

    accept: Float[Array, "B K"]
    emit: Float[Array, "B 2"]
    rounds: Float[Array, "B 3 R"] | None = None


class Verification(NamedTuple):
    """The decisions of a verification rule for B sequences.

    Attributes:
      tokens: The accepted drafts, then one residual or bonus token, then `PAD_TOKEN`.
      num_accepted: Number of accepted drafts, 0 to K; `num_accepted + 1` tokens are emitted.
      log_probs: log p of each emitted token under the filtered target, 0 at padding, -inf for a token
        emitted from a degenerate row.
      accept_prob: min(1, p/q) at each drafted token, 0 where nothing was drafted. In large batches the GPU kernel may
        skip rows after the first rejection, where `accept_prob` is 0 too (`pallas_kernels.config.exits_early`).
      status: 0, or a sum of `DEGENERATE_TARGET`, `DEGENERATE_DRAFT` and `EMPTY_RESIDUAL`. Covers the rows
        up to and including the one that emitted the last token.
    """

    tokens: Int[Array, "B K1"]
    num_accepted: Int[Array, "B"]
    log_probs: Float[Array, "B K1"]
    accept_prob: Float[Array, "B K"]
    status: Int[Array, "B"]


class SigmoidVerification(NamedTuple):
    """The decisions of the sigmoid kernel: a `Verification` without `log_probs`, which need all rows.

    Attributes:
      tokens: As in `Verification`.
      num_accepted: As in `Verification`.
      accept_prob: min(1, s_p/s_q) of each drafted token, 0 where s_p is 0 or nothing was drafted.
      status: As in `Verification`, but only of the rows (target and draft) that emitted the last token.
    """

    tokens: Int[Array, "B K1"]
    num_accepted: Int[Array, "B"]
    accept_prob: Float[Array, "B K"]
    status: Int[Array, "B"]
