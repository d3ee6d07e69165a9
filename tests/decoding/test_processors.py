"""Logits processors: equal to transformers' on the same texts, and exact within the loop."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding import processors, truncation

pytestmark = pytest.mark.optimised(False)

FIXTURE = np.load(Path(__file__).parents[1] / "fixtures" / "processors.npz")
END, PROMPT = 10, 3
REPETITION, BIGRAMS = processors.RepetitionPenalty(1.3), processors.NoRepeatNGram(2)
WORDS = processors.ForbidSequences(((4,), (1, 2), (2, 0, 1)))
CASES = {
    "repetition": REPETITION,
    "ngram1": processors.NoRepeatNGram(1),
    "ngram2": BIGRAMS,
    "ngram3": processors.NoRepeatNGram(3),
    "words": WORDS,
    "min_length": processors.SuppressBefore((END,), 6),
    "min_new_tokens": processors.SuppressBefore((END,), PROMPT + 2),
    "suppress": processors.SuppressTokens((0, 7)),
    "forced_begin": processors.ForceToken(5, 1),
    "forced_end": processors.ForceToken(END, 8),
    "chain": processors.Chain((REPETITION, BIGRAMS, WORDS)),
    "typical": truncation.Typical(0.6, 0.7),
    "epsilon": truncation.EpsilonCutoff(0.08, 1.5),
    "filters": processors.Chain(
        (
            truncation.Filters(ss.SamplingParams(0.7, 6, 0.95, 0.02)),
            truncation.Typical(0.8, 0.7),
            truncation.EpsilonCutoff(0.1, 0.7),
        )
    ),
}
TEMPERATURES = {"typical": 0.7, "epsilon": 1.5, "filters": 0.7}
"""transformers divides the logits by these, and leaves them divided."""


@pytest.mark.parametrize("name", CASES)
def test_a_processor_equals_that_of_transformers(name):
    # Columns after a text's end hold another token of it: they must not count.
    got = jax.jit(CASES[name])(jnp.asarray(FIXTURE["tokens"]), jnp.asarray(FIXTURE["lengths"]), FIXTURE["logits"])
    np.testing.assert_allclose(got / np.float32(TEMPERATURES.get(name, 1)), FIXTURE[name], rtol=1e-6)
    assert not np.array_equal(FIXTURE[name], FIXTURE["logits"])


def test_tokens_no_text_begins_with():
    process = processors.SuppressBefore((0, 7), PROMPT + 1)
    at_begin = FIXTURE["lengths"] == PROMPT
    got = process(*(jnp.asarray(FIXTURE[name][at_begin]) for name in ("tokens", "lengths", "logits")))
    np.testing.assert_array_equal(got, FIXTURE["suppress_begin"][at_begin])


def test_count_penalties_leave_the_prompt_out():
    process = processors.CountPenalty(jnp.array([1.0, 0.0]), 0.5, jnp.array([2, 1]))
    tokens, lengths = jnp.array([[3, 3, 1, 1, -1], [0, 2, 2, 2, 1]]), jnp.array([4, 4])
    got = process(tokens, lengths, jnp.zeros((2, 4)))
    np.testing.assert_array_equal(got, [[0, -2, 0, 0], [0, 0, -1.5, 0]])


@pytest.mark.parametrize("process", [truncation.Typical(0.3, 0.0), truncation.EpsilonCutoff(0.9, 0.0)])
def test_greedy_rows_are_left_as_they_are(process):
    inputs = [jnp.asarray(FIXTURE[name]) for name in ("tokens", "lengths", "logits")]
    np.testing.assert_array_equal(process(*inputs), inputs[-1])


def test_a_penalty_on_logits_of_16_bits_is_not_rounded():
    logits = jnp.array([[4.0, 4.0, -1.0]], "bfloat16")
    got = processors.RepetitionPenalty(1.001)(jnp.array([[1]]), jnp.array([1]), logits)
    assert got.dtype == "float32"
    assert got[0, 1] < got[0, 0]


NUM_SAMPLES, NUM_NEW = 20_000, 3
TARGET, DRAFT = tables.table(3, 1.0), tables.table(4, 1.0)
TEXT = [1, 2, 1]
PROCESS = processors.Chain(
    (
        processors.RepetitionPenalty(1.5),
        processors.CountPenalty(0.5, 0.3, len(TEXT)),
        processors.NoRepeatNGram(3),
        processors.ForbidSequences(((2, 2),)),
        truncation.Typical(0.9),
        truncation.EpsilonCutoff(0.05),
    )
)


def processed(text):
    """The target's logits after a text, processed as the settings' definitions say, token by token."""
    logits = tables.logits_after(TARGET, text).astype(np.float64)
    for token in set(text):
        logits[token] = logits[token] * 1.5 if logits[token] < 0 else logits[token] / 1.5
    for token in range(tables.VOCAB):
        count = text[len(TEXT) :].count(token)
        logits[token] -= 0.5 * (count > 0) + 0.3 * count
    for i in range(len(text) - 2):
        if text[i : i + 2] == text[-2:]:
            logits[text[i + 2]] = -np.inf
    if text[-1] == 2:
        logits[2] = -np.inf
    probs = np.exp(logits) / np.exp(logits).sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.abs(-np.log(probs) + np.nansum(probs * np.log(probs)))
    order = np.argsort(distance)
    num_kept = np.searchsorted(probs[order].cumsum(), 0.9) + 1
    logits[order[num_kept:]] = -np.inf
    probs = np.exp(logits) / np.exp(logits).sum()
    logits[(probs < 0.05) & (probs < probs.max())] = -np.inf
    return logits


@pytest.mark.optimised(True)  # runs for longer than it compiles
@pytest.mark.parametrize("draft", [tables.model(DRAFT), ss.NGramDrafter()], ids=["model", "ngram"])
def test_the_loop_emits_the_law_of_the_processed_target(draft):
    expected = oracle.target_law(lambda prefix: oracle.distribution(processed([*TEXT, *prefix])), NUM_NEW)
    result = ss.generate(
        jax.random.key(5),
        np.broadcast_to(TEXT, (NUM_SAMPLES, len(TEXT))),
        target=tables.model(TARGET),
        draft=draft,
        num_draft=2,
        max_new_tokens=NUM_NEW,
        process_logits_fn=PROCESS,
    )
    cells = {text: i for i, text in enumerate(expected)}
    texts, counts = np.unique(np.asarray(result.tokens[:, len(TEXT) :]), axis=0, return_counts=True)
    observed = np.zeros(len(cells))
    observed[[cells[tuple(text.tolist())] for text in texts]] = counts
    assert oracle.chi_square(observed, np.array(list(expected.values()))) > 1e-4
    accepted, drafted = result.stats.num_accepted.sum(), result.stats.num_drafted.sum()
    assert 0.02 * drafted < accepted < 0.98 * drafted
