"""Small laws, enumerated in float64, and the texts that complete what a step emitted."""

import itertools

import numpy as np
from jaxtyping import Float, Int

VOCAB, NUM_DRAFT = 4, 2
"""Size of the small laws: texts of K + 1 tokens are enumerated."""


def table(seed: int, sharpness: float) -> Float[np.ndarray, "V1 V1 V"]:
    """Returns logits by the last two tokens, index V where there is none; some tokens have probability zero."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(VOCAB + 1, VOCAB + 1, VOCAB)) * sharpness
    logits[rng.random(logits.shape) < 0.15] = -np.inf
    logits[..., 0] = np.where(np.isinf(logits).all(-1), 0, logits[..., 0])
    return logits.astype(np.float32)


def probs(
    logits: Float[np.ndarray, "*R V"],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> Float[np.ndarray, "*R V"]:
    """Returns the distributions of rows of logits under sampling parameters: a plain softmax in float64, filtered."""
    z = np.asarray(logits, np.float64)
    if temperature == 0:
        return np.eye(z.shape[-1])[z.argmax(-1)]
    z = z / temperature
    if top_k:
        kth = np.sort(z, axis=-1)[..., [max(z.shape[-1] - top_k, 0)]]
        z = np.where(z >= kth, z, -np.inf)
    p = _softmax(z)
    if top_p < 1:
        descending = -np.sort(-p, axis=-1)
        reached = np.cumsum(descending, axis=-1) >= top_p
        last = np.where(reached.any(-1), reached.argmax(-1), p.shape[-1] - 1)
        p = np.where(p >= np.take_along_axis(descending, last[..., None], -1), p, 0)
    p = np.where(p >= min_p * p.max(-1, keepdims=True), p, 0)
    return p / p.sum(-1, keepdims=True)


def _softmax(z: Float[np.ndarray, "*R V"]) -> Float[np.ndarray, "*R V"]:
    weights = np.exp(z - z.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def text_law(p: Float[np.ndarray, "V1 V1 V"]) -> Float[np.ndarray, "N"]:
    """Returns the probability of each text of K + 1 tokens, in the order of `text_index`."""
    law = np.zeros(VOCAB ** (NUM_DRAFT + 1))
    for text in itertools.product(range(VOCAB), repeat=NUM_DRAFT + 1):
        before = (VOCAB, VOCAB, *text)
        factors = [p[before[i], before[i + 1], token] for i, token in enumerate(text)]
        law[text_index(np.array([text]))[0]] = np.prod(factors)
    return law


def text_index(texts: Int[np.ndarray, "N K1"]) -> Int[np.ndarray, "N"]:
    """Returns one number per text."""
    return texts @ VOCAB ** np.arange(texts.shape[1])


def complete(tokens: Int[np.ndarray, "N K1"], p: Float[np.ndarray, "V1 V1 V"], seed: int) -> Int[np.ndarray, "N K1"]:
    """Returns the emitted tokens, each row continued with the target's own: the law of the result is then p's."""
    rng, tokens = np.random.default_rng(seed), tokens.copy()
    padded = np.pad(tokens, ((0, 0), (2, 0)), constant_values=VOCAB)
    for i in range(tokens.shape[1]):
        running = np.cumsum(p[padded[:, i], padded[:, i + 1]], axis=-1)
        own = (rng.random((len(tokens), 1)) * running[:, -1:] >= running).sum(-1)
        tokens[:, i] = np.where(tokens[:, i] < 0, np.minimum(own, VOCAB - 1), tokens[:, i])
        padded[:, i + 2] = tokens[:, i]
    return tokens
