"""The law of the first token that each rule emits, exactly, from logits in float64: no sampling.

A draft x comes from q and is accepted with probability a(x); else the token comes from the residual r. The law is
`q a + (1 - sum q a) r`. Block verification of one draft is the token rule. The coupled rule has another law of a: its
mean is in closed form too.
"""

import methods
import numpy as np
from jaxtyping import Float

Rows = Float[np.ndarray, "N V"]


def softmax(z: Rows) -> Rows:
    """Probabilities of each row; -inf is 0."""
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def filtered(z: Rows, temperature: float, top_k: int, top_p: float) -> Rows:
    """Logits divided by the temperature and then filtered, as `specsamp_jax.SamplingParams` means it; -inf if dropped.

    Top-k comes first; top-p is a share of what it leaves.
    """
    return keep_top_p(keep_top_k(z / temperature, top_k), top_p)


def keep_top_k(z: Rows, top_k: int) -> Rows:
    """The `top_k` largest logits of each row and those equal to the smallest of them; 0 keeps all, and so does V."""
    if not 0 < top_k < z.shape[-1]:
        return z
    return np.where(z >= np.partition(z, -top_k, axis=-1)[:, -top_k, None], z, -np.inf)


def keep_top_p(z: Rows, top_p: float) -> Rows:
    """The fewest largest logits of each row with this much probability, and those equal to the smallest; 1 keeps all.

    The largest logit is always kept.
    """
    if top_p >= 1:
        return z
    descending = np.sort(z, axis=-1)[:, ::-1]
    reached = np.cumsum(softmax(descending), axis=-1) >= top_p
    # The sum of all may round to below top_p.
    last = np.where(reached.any(-1), reached.argmax(-1), -1)
    return np.where(z >= np.take_along_axis(descending, last[:, None], axis=-1), z, -np.inf)


def total_variation(p: Rows, q: Rows) -> Float[np.ndarray, "N"]:
    """Half the sum of absolute differences."""
    return np.abs(p - q).sum(-1) / 2


def calibrated(z_p: Rows, z_q: Rows, estimates: Float[np.ndarray, "N"], offset: float) -> tuple[Rows, Rows]:
    """The law of the first token by `verify_calibrated`, and the acceptance probability of each token.

    Args:
      z_p: Filtered logits of the target.
      z_q: Filtered logits of the drafter.
      estimates: The estimate of each target row's log-normaliser.
      offset: c, the distance of alpha from the estimate.
    """
    p, q, eps = softmax(z_p), softmax(z_q), np.exp(-offset)
    h = np.exp(np.minimum(z_p - estimates[:, None], 0))
    accept = np.minimum(1, np.divide(h * (1 + eps * q), q * (1 + eps * h), out=np.ones_like(p), where=q > 0))
    return _emitted(q, accept, _normalised(np.maximum(p - q * accept, 0), p)), accept


def log_normalizer(z: Rows) -> Float[np.ndarray, "N"]:
    """Logsumexp of each row."""
    top = z.max(-1)
    return top + np.log(np.exp(z - top[:, None]).sum(-1))


def first_token(method: str, z_p: Rows, z_q: Rows) -> Rows:
    """The law of the first token by a rule of `methods.VERIFY_FNS`, from filtered logits."""
    p, q = softmax(z_p), softmax(z_q)
    if method in methods.EXACT:
        return _emitted(q, _ratio(p, q), _normalised(np.maximum(p - q, 0), p))
    if method == "sigmoid as released":
        s_p, s_q = _released_scores(z_p), _released_scores(z_q)
        a = np.maximum(s_p - s_q, 0)
        residual = np.maximum(a / (methods.RELEASED_SUM_START + a.sum(-1, keepdims=True)), methods.RELEASED_FLOOR)
        return _emitted(q, _ratio(s_p, s_q), _normalised(residual, p))
    s_p, s_q = _scores(z_p, _width(method)), _scores(z_q, _width(method))
    return _emitted(q, _ratio(s_p, s_q), _normalised(np.maximum(s_p - s_q, 0), bonus(method, z_p)))


def bonus(method: str, z_p: Rows) -> Rows:
    """The law of the token that follows when all drafts are accepted."""
    if method in methods.EXACT:
        return softmax(z_p)
    if method == "sigmoid as released":
        weights = np.maximum(z_p, methods.RELEASED_FLOOR)
    else:
        weights = _scores(z_p, _width(method))
    return weights / weights.sum(-1, keepdims=True)


def acceptance(method: str, z_p: Rows, z_q: Rows) -> Float[np.ndarray, "N"]:
    """The probability that the first draft is accepted."""
    q = softmax(z_q)
    if method == "coupled":
        return coupled_acceptance(softmax(z_p), q)
    if method in methods.EXACT:
        return (q * _ratio(softmax(z_p), q)).sum(-1)
    scores = _released_scores if method == "sigmoid as released" else lambda z: _scores(z, _width(method))
    return (q * _ratio(scores(z_p), scores(z_q))).sum(-1)


def coupled_acceptance(p: Rows, q: Rows) -> Float[np.ndarray, "N"]:
    """The probability that `argmax(log p + G)` equals `argmax(log q + G)`, with one Gumbel noise G in both.

    Token v is both with probability 1 / sum_w max(p_w / p_v, q_w / q_v): w loses to v under p and under q. Sorted by
    p / q, the terms after v are p_w / p_v and those before it q_w / q_v.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        order = np.argsort(np.where(q > 0, p / q, np.inf), axis=-1)
        p, q = (np.take_along_axis(x, order, axis=-1) for x in (p, q))
        from_here = np.cumsum(p[:, ::-1], axis=-1)[:, ::-1]
        before = np.cumsum(q, axis=-1) - q
        share = 1 / (from_here / p + before / q)
    return np.where((p > 0) & (q > 0), share, 0).sum(-1)


def _width(method: str) -> float:
    return float(method.removeprefix("sigmoid "))


def _scores(z: Rows, width: float) -> Rows:
    with np.errstate(over="ignore"):  # -inf scores 0
        return 1 / (1 + np.exp(-(z + width / 2) / width))


def _released_scores(z: Rows) -> Rows:
    scores = _scores(z, methods.RELEASED_BETA - methods.RELEASED_ALPHA)
    return np.where(z < methods.RELEASED_ALPHA, 0, np.where(z > methods.RELEASED_BETA, 1, scores))


def _ratio(p: Rows, q: Rows) -> Rows:
    return np.minimum(1, np.divide(p, q, out=np.ones_like(p), where=q > 0))


def _normalised(weights: Rows, otherwise: Rows) -> Rows:
    sums = weights.sum(-1, keepdims=True)
    return np.where(sums > 0, weights / np.where(sums > 0, sums, 1), otherwise)


def _emitted(q: Rows, accept: Rows, residual: Rows) -> Rows:
    accepted = q * accept
    return accepted + (1 - accepted.sum(-1, keepdims=True)) * residual
