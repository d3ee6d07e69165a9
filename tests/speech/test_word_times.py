"""Times of words equal those of the transformers library, and paths through a matrix those of a plain recursion."""

import dataclasses
import functools
import inspect
import json

import fixture_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from whisper_fixture import FIXTURES, LONG, SHORT, module
from whisper_inputs import SPOKEN_FRAMES, spoken_states, spoken_tokens

from specsamp_jax.models.whisper.model import WhisperConfig, cross_attention, decoder_model
from specsamp_jax.models.whisper.settings import load_settings
from specsamp_jax.speech import load_speech, transcribe
from specsamp_jax.speech.word_times import best_path, median_filter, spoken_from, token_edges
from specsamp_jax.speech.words import split_words, timed_words

pytestmark = pytest.mark.optimised(False)


@functools.cache
def target():
    return load_speech(FIXTURES / "multilingual")


def theirs():
    return fixture_files.values("whisper/words.json")


def edges(heads, tokens=None, lengths=None, begin=3):
    tokens = spoken_tokens() if tokens is None else tokens
    lengths = np.full(len(tokens), tokens.shape[1]) if lengths is None else lengths
    model = decoder_model(module("multilingual"), jnp.asarray(spoken_states()[: len(tokens)]))
    num_states = np.array(SPOKEN_FRAMES[: len(tokens)]) // 2
    heads = tuple(map(tuple, heads))
    return token_edges(model, tokens, lengths, num_states, begin=begin, heads=heads, filter_width=7)


@pytest.mark.parametrize("name", ["listed", "last half"])
def test_times_of_tokens_are_those_of_transformers(name):
    found = edges(theirs()["heads"][name])
    for row, expected in zip(found, theirs()["times"][name], strict=True):
        np.testing.assert_allclose(row, [0.0, *expected], atol=1e-6)
    assert max(len(np.unique(row)) for row in found) > 2


@pytest.mark.parametrize(("language", "code"), [("english", "en"), ("english", None), ("japanese", "ja")])
def test_words_are_those_of_transformers(language, code):
    tokenizer = target().tokenizer
    for row, spans, expected in zip(
        spoken_tokens()[:, 3:], edges(theirs()["heads"]["listed"]), theirs()[language], strict=True
    ):
        words = timed_words(tokenizer, row, spans, end_token=60, language=code, offset=0.0)
        assert [[*word] for word in words] == expected
        later = timed_words(tokenizer, row, spans, end_token=60, language=code, offset=28.56)
        assert later[-1].start == round(28.56 + words[-1].start, 2)


def test_the_heads_of_a_checkpoint_without_a_list_are_the_last_half():
    settings, config = target().settings, target().module.config
    assert settings.alignment_heads is None
    assert [[*pair] for pair in settings.heads(config)] == theirs()["heads"]["last half"]
    three = dataclasses.replace(config, decoder_layers=3)
    assert {layer for layer, _ in settings.heads(three)} == {1, 2}
    listed = dataclasses.replace(settings, alignment_heads=((1, 3), (0, 1)))
    assert listed.heads(config) == ((1, 3), (0, 1))
    with pytest.raises(ValueError, match="layer below 1 and a head below 4, by the config"):
        listed.heads(dataclasses.replace(config, decoder_layers=1))


@pytest.mark.parametrize("value", [[], "all", [[0]], [[0, -1]], [[0, 1.0]], [[True, 1]], [3, 1]])
def test_broken_lists_of_heads_raise_an_error(tmp_path, value):
    settings = json.loads((FIXTURES / "multilingual" / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "alignment_heads": value}))
    with pytest.raises(ValueError, match="alignment_heads in "):
        load_settings(tmp_path, module("multilingual").config)


def test_weights_sum_to_1_and_depend_on_earlier_tokens_alone():
    heads, tokens = tuple(map(tuple, theirs()["heads"]["listed"])), spoken_tokens()
    model = decoder_model(module("multilingual"), jnp.asarray(spoken_states()))
    weights = cross_attention(model, tokens, heads=heads)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    tokens[:, 9:] = 5
    changed = cross_attention(model, tokens, heads=heads)
    np.testing.assert_allclose(changed[:, :, :9], weights[:, :, :9], atol=1e-6)
    assert np.abs(changed - weights).max() > 0.01
    with pytest.raises(ValueError, match="model must come from decoder_model"):
        inspect.unwrap(cross_attention)(dataclasses.replace(model, apply_fn=len), tokens, heads=heads)


def test_texts_that_end_early_or_have_no_token():
    heads, tokens = theirs()["heads"]["listed"], spoken_tokens()
    tokens[1, 10:] = -1
    tokens[2, 3:] = -1
    lengths = np.array([tokens.shape[1], 10, 3])
    first, second, none = edges(heads, tokens, lengths)
    np.testing.assert_array_equal(first, edges(heads)[0])
    assert (second.size, none.tolist()) == (8, [0.0, 0.0])
    assert edges(heads, tokens[:1], np.array([4]))[0].tolist() == [0.0, 0.0]  # a first token at the limit
    assert spoken_from(np.zeros((2, 3, 0), "f"), 7).tolist() == [0, 0, 0]  # no sound
    # States with equal weights everywhere have no say, rather than NaN.
    assert spoken_from(np.full((2, 1, 9), 0.1, "f"), 7).tolist() == [0]


def slow_path(cost):
    """First columns of the best path, cell by cell."""

    @functools.cache
    def best(i, j):
        """Cost of the best path to a cell, and the cell before it."""
        if min(i, j) < 0:
            return (0.0 if i == j == -1 else np.inf), None
        both, row, column = best(i - 1, j - 1)[0], best(i - 1, j)[0], best(i, j - 1)[0]
        before = (i, j - 1) if column <= min(both, row) else (i - 1, j - 1) if both <= row else (i - 1, j)
        return cost[i, j] + min(both, row, column), before

    cell, first = (len(cost) - 1, len(cost[0]) - 1), {}
    while min(cell) >= 0:
        first[cell[0]] = cell[1]
        cell = best(*cell)[1]
    return [first[i] for i in range(len(cost))]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1), (5, 9), (9, 5), (7, 7)])
def test_the_path_is_the_best_of_all(shape):
    rng = np.random.default_rng(0)
    for _ in range(20):
        cost = rng.integers(-3, 4, shape).astype(float)  # many paths are equally good
        assert best_path(cost).tolist() == slow_path(cost)


def test_a_median_is_taken_of_the_mirrored_row():
    np.testing.assert_array_equal(median_filter(np.array([[5.0, 1, 9, 2, 8]]), 3), [[1, 5, 2, 8, 2]])
    np.testing.assert_array_equal(median_filter(np.array([[5.0, 1, 9]]), 7), [[5, 1, 9]])
    with pytest.raises(ValueError, match="median_filter_width must be odd, got 4"):
        WhisperConfig(median_filter_width=4)


def test_a_transcript_has_the_words_of_its_text_counted_from_the_start_of_the_sound():
    hear = functools.partial(transcribe, jax.random.key(0), target=target(), draft=None, language="en", batch_size=1)
    sounds = [LONG[1], SHORT[0]]
    plain, timed = (hear(sounds, max_new_tokens=16, timestamps=name).transcripts for name in ("always", "word"))
    for with_words, without in zip(timed, plain, strict=True):
        assert with_words.tokens.tolist() == without.tokens.tolist()
        assert [segment[:3] for segment in with_words.segments] == [segment[:3] for segment in without.segments]
        assert all(segment.words == () for segment in without.segments)
        for segment in with_words.segments:
            assert "".join(word.text for word in segment.words).strip() == segment.text
            assert all(word.start <= word.end for word in segment.words)
    # In later windows, too.
    first, *_, last = timed[0].segments
    assert 0 <= first.words[0].start < 2.0 < last.words[-1].end <= 2.7


def test_words_of_a_list_of_another_model_are_refused():
    listed = dataclasses.replace(target().settings, alignment_heads=((5, 0),))
    with pytest.raises(ValueError, match="must be pairs of a layer below 2"):
        inspect.unwrap(transcribe)(
            jax.random.key(0), SHORT[:1], target=target()._replace(settings=listed), draft=None, timestamps="word"
        )


def test_words_are_split_at_spaces_and_joined_with_their_punctuation():
    tokenizer = target().tokenizer
    encoded = tokenizer.encode("he's well-off, é?").ids
    assert [word.text for word in split_words(tokenizer, encoded, "en")] == ["he", "'s", " well", "-off,", " é?"]
    assert split_words(tokenizer, [], "en") == []


def test_opening_punctuation_belongs_to_the_word_after_it():
    spelled = [" Say", " (", '"', "yes", "!", '"', " -", " no", ")."]
    ids = {text: i for i, text in enumerate(dict.fromkeys(spelled))}
    tokenizer = Tokenizer(models.WordLevel(ids))
    tokenizer.decoder = decoders.Fuse()
    words = split_words(tokenizer, [ids[text] for text in spelled], None)
    assert [tuple(word) for word in words] == [(" Say", 0, 1), (' ("yes!"', 1, 6), (" - no).", 6, 9)]
