"""Types, flags and constants that the kernels and the plain JAX cores share, declared once."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Float, Int

TILE = 1024
"""Vocabulary entries per tile. Two-level sampling picks a tile by the sum of its weights, then a token in it."""

PAD_TOKEN = -1
"""Fills `tokens` wherever there is no token."""

DEGENERATE_TARGET = 1
"""Flag of `Verification.status`: a target row in use holds NaN or +inf, or keeps no token."""

DEGENERATE_DRAFT = 2
"""Flag of `Verification.status`: a draft row in use holds NaN or +inf, keeps no token, or not the drafted one."""

EMPTY_RESIDUAL = 4
"""Flag of `Verification.status`: a draft was rejected where max(p - q, 0) is zero to the last bit."""

LARGEST_LOG_NORMALIZER = 128.0
"""Above it a float32 logsumexp is off by more than 2**-17, and so is every q: the rows are read instead."""


class Filter(NamedTuple):
    """`SamplingParams` as a scale and a cutoff per row of logits; a field that is None applies to no row.

    Attributes:
      scale: Multiplies the logits, 1/temperature; 1 for greedy rows. None: 1.
      cutoff: The smallest kept logit, before scaling, as wide as the arithmetic. None: all are kept.
      greedy: True where all probability is on the first largest logit. None: nowhere.
    """

    scale: Float[Array, "B"] | None = None
    cutoff: Float[Array, "B R"] | None = None
    greedy: Bool[Array, "B"] | None = None


class Uniforms(NamedTuple):
    """The random draws of one verification: uniforms in [0, 1).

    Attributes:
      accept: One per draft position.
      emit: Two for the residual or bonus token: its tile, then its position in the tile.
    """

    accept: Float[Array, "B K"]
    emit: Float[Array, "B 2"]


class Verification(NamedTuple):
    """The decisions of a verification rule for B sequences.

    Attributes:
      tokens: The accepted drafts, then one residual or bonus token, then `PAD_TOKEN`.
      num_accepted: How many drafts were accepted, 0 to K; `num_accepted + 1` tokens are emitted.
      log_probs: log p of each emitted token under the filtered target, 0 at padding, -inf for a token
        emitted from a degenerate row.
      accept_prob: min(1, p/q) at each drafted token, 0 where nothing was drafted. The GPU kernel reads no row past
        the first rejection where the batch is large (512 drafts in 64 rows or more, or 132 rows), and is 0 there too.
      status: 0, or a sum of `DEGENERATE_TARGET`, `DEGENERATE_DRAFT` and `EMPTY_RESIDUAL`. Only rows that
        had a part in the result count: those up to and including the one that emitted the last token.
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
      status: As in `Verification`, of the rows that the last token came from.
    """

    tokens: Int[Array, "B K1"]
    num_accepted: Int[Array, "B"]
    accept_prob: Float[Array, "B K"]
    status: Int[Array, "B"]
