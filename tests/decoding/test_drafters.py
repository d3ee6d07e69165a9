"""Drafters by hand: n-grams, and the draft length of the paper's heuristic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.decoding.drafters import append

pytestmark = pytest.mark.optimised(False)


def propose(texts, num_draft, **options):
    width = max(map(len, texts)) + num_draft
    tokens = jnp.array([[*text, *[ss.PAD_TOKEN] * (width - len(text))] for text in texts])
    drafter = ss.NGramDrafter(**options)
    keys = jax.random.split(jax.random.key(0), len(texts))
    draft, state = drafter.propose(
        keys,
        drafter.init(tokens, width),
        tokens,
        jnp.array([len(text) for text in texts]),
        num_draft=num_draft,
        sampling=ss.SamplingParams(),
        process_logits_fn=lambda tokens, lengths, logits: logits,
    )
    assert draft.logits is None
    assert state == ()
    return draft.tokens.tolist()


def test_what_followed_the_last_occurrence_is_drafted():
    assert propose([[5, 6, 7, 8, 9, 5, 6]], 3) == [[7, 8, 9]]
    # The last of two occurrences counts; a longer n-gram counts more than a later one.
    assert propose([[1, 7, 1, 8, 1]], 1) == [[8]]
    assert propose([[3, 1, 7, 2, 1, 8, 3, 1]], 1) == [[7]]
    assert propose([[3, 1, 7, 2, 1, 8, 3, 1]], 1, max_ngram=1) == [[8]]


def test_a_text_that_repeats_itself_goes_on_repeating():
    assert propose([[4, 4, 4]], 4) == [[4, 4, 4, 4]]
    assert propose([[1, 2, 1, 2]], 5) == [[1, 2, 1, 2, 1]]


def test_without_an_occurrence_nothing_is_drafted():
    assert propose([[1, 2, 3], [1, 2, 1], [7]], 2) == [[-1, -1], [2, 1], [-1, -1]]
    assert propose([[1, 2, 3, 1]], 2, min_ngram=2) == [[-1, -1]]


def test_wrong_ngram_sizes_raise_an_error():
    with pytest.raises(ValueError, match="min_ngram = 3, max_ngram = 2"):
        ss.NGramDrafter(max_ngram=2, min_ngram=3)


def test_append_writes_after_each_row_and_drops_tokens_that_do_not_fit():
    tokens = jnp.full((3, 4), -1)
    new = jnp.array([[1, 2], [3, 4], [5, 6]])
    assert append(tokens, jnp.array([0, 2, 3]), new).tolist() == [[1, 2, -1, -1], [-1, -1, 3, 4], [-1, -1, -1, 5]]
    few = append(tokens, jnp.array([0, 2, 3]), new, jnp.array([1, 0, 2]))
    assert few.tolist() == [[1, -1, -1, -1], [-1] * 4, [-1, -1, -1, 5]]


def test_the_heuristic_adds_two_after_full_acceptance_and_else_subtracts_one():
    rule = ss.HeuristicNumDraft(5, lengths=(1, 4, 8))
    lengths = rule.update(jnp.array([5, 5, 7, 8, 1, 2]), jnp.array([5, 4, 7, 8, 0, 0]))
    assert lengths.tolist() == [7, 4, 8, 8, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": (3, 1)}, r"must be ascending and at least 1; got \(3, 1\)"),
        ({"lengths": ()}, "ascending"),
        ({"lengths": (0, 5)}, "at least 1"),
        ({"initial": 9}, "initial must be from 1 to the largest of lengths, 8; got 9"),
    ],
)
def test_wrong_lengths_raise_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        ss.HeuristicNumDraft(**options)


def test_each_row_follows_its_own_heuristic():
    import tables

    model = tables.model(tables.table(0))
    prompt = np.array([[1, 2], [3, 0]])
    rule = ss.HeuristicNumDraft(1, lengths=(1, 3, 5))
    state = ss.init(prompt, target=model, draft=model, num_draft=rule, max_new_tokens=30)
    advance = jax.jit(lambda key, state: ss.step(key, state, target=model, draft=model, num_draft=rule))
    drafted = []
    for _ in range(3):
        state, info = advance(jax.random.key(0), state)
        drafted.append(info.num_drafted.tolist())
    # The target drafting for itself is always accepted: 1, 3, then 5, the longest.
    assert drafted == [[1, 1], [3, 3], [5, 5]]
