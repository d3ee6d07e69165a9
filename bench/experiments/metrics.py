"""Quality of texts: ROUGE, word error rate, and bootstrap intervals.

Needs rouge-score for summarisation, jiwer and whisper-normalizer for recognition. Scores of a text are numbers that add
up over texts: the measure of a set of texts is a ratio of sums.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 2000
MEASURES = {"rouge": ("ROUGE-L", "ROUGE-1", "ROUGE-2"), "wer": ("WER",)}
"""Measures in percent, by a task's metric; the first is the one that claims are about."""

Scores = Float[np.ndarray, "N 2 M"]
"""Numerator and denominator of each text and measure."""


def rouge(references: Sequence[str], texts: Sequence[str]) -> Scores:
    """F1 of ROUGE-L, -1 and -2 with stemming, each over 1."""
    from rouge_score import rouge_scorer  # pyright: ignore[reportMissingImports]

    names = ["rougeL", "rouge1", "rouge2"]
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    found = (scorer.score(*pair) for pair in zip(references, texts, strict=True))
    return np.array([[[score[name].fmeasure for name in names], [1.0] * 3] for score in found])


def wer(references: Sequence[str], texts: Sequence[str]) -> Scores:
    """Word errors over words of the reference, both normalised as Whisper's authors do."""
    import jiwer  # pyright: ignore[reportMissingImports]
    from whisper_normalizer.english import EnglishTextNormalizer  # pyright: ignore[reportMissingImports]

    clean = EnglishTextNormalizer()
    found = []
    for reference, text in zip(references, texts, strict=True):
        words = clean(reference)
        out = jiwer.process_words(words, clean(text))
        found.append([[out.substitutions + out.deletions + out.insertions], [len(words.split())]])
    return np.array(found, float)


SCORERS = {"rouge": rouge, "wer": wer}


def percent(scores: Scores) -> Float[np.ndarray, "M"]:
    """Each measure of a set of texts."""
    sums = scores.sum(0)
    return 100 * sums[0] / np.maximum(sums[1], 1e-9)


def interval(scores: Scores, others: Scores | None = None) -> tuple[float, float, float]:
    """The first measure, or its difference to that of other outputs for the same texts, with its 95 % interval.

    Texts are resampled, both outputs of a text together. The seed is fixed.
    """
    rng = np.random.default_rng(0)
    index = rng.integers(len(scores), size=(NUM_RESAMPLES, len(scores)))

    def ratio(values: Scores) -> np.ndarray:
        sums = values[index][..., 0].sum(1)
        return 100 * sums[:, 0] / np.maximum(sums[:, 1], 1e-9)

    value, drawn = percent(scores)[0], ratio(scores)
    if others is not None:
        value, drawn = value - percent(others)[0], drawn - ratio(others)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(value), float(low), float(high)
