"""Rules on the next token of Whisper: cases by hand, and equality with transformers."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from whisper_fixture import FIXTURES, module, texts_and_logits

from specsamp_jax.decoding.processors import SuppressTokens
from specsamp_jax.models.whisper.rules import Rules, SuppressAtBegin, TimestampRules
from specsamp_jax.models.whisper.settings import load_settings

pytestmark = pytest.mark.optimised(False)

TIMES = TimestampRules(begin=3, end_token=60, first_timestamp=71, max_initial=9)


def forbidden(rule, tokens, logits=None):
    """The tokens, out of 120, whose logits a rule sets to -inf after a text."""
    width = 12
    text = np.full((1, width), -1)
    text[0, : len(tokens)] = tokens
    logits = np.zeros((1, 120), "f") if logits is None else logits
    out = jax.jit(rule)(text, np.array([len(tokens)]), logits)
    assert not np.isnan(out).any()
    kept = ~np.isneginf(out)
    np.testing.assert_array_equal(np.asarray(out)[kept], logits[kept])
    return set(np.flatnonzero(~kept[0]).tolist())


TEXT, STAMPS = set(range(60)), set(range(71, 120))
LOUD_TEXT = np.where(np.arange(120) <= 60, 9.0, 0.0).astype("f")[None]  # so that timestamps have no majority


@pytest.mark.parametrize(
    ("said", "gone"),
    [
        # First comes a timestamp, not too late.
        ([], set(range(71)) | set(range(81, 120))),
        # Behind the first one there is text, or the end.
        ([75], {70} | STAMPS),
        # Behind text there may be a later timestamp.
        ([75, 5], {70} | set(range(71, 76))),
        # Behind text and a timestamp there is the other of the pair, which may be the same, or the end.
        ([75, 5, 80], TEXT | {70} | set(range(71, 80)) | set(range(61, 70))),
        # Behind a pair there is text.
        ([75, 5, 80, 80], {70} | STAMPS),
        ([75, 5, 80, 82, 6], {70} | set(range(71, 83))),
    ],
)
def test_timestamps_come_first_in_pairs_and_never_go_back(said, gone):
    assert forbidden(TIMES, [61, 62, 66, *said], LOUD_TEXT) - set(range(61, 70)) == gone - set(range(61, 70))


def test_a_timestamp_is_forced_if_all_together_are_more_probable_than_each_token_of_text():
    logits = np.zeros((1, 120), "f")  # 49 timestamps against each of 71 others, and after [75, 5] still 44
    logits[0, 7] = np.log(43.5)
    assert forbidden(TIMES, [61, 62, 66, 75, 5], logits) == set(range(76))
    logits[0, 7] = np.log(44.5)
    assert forbidden(TIMES, [61, 62, 66, 75, 5], logits) == {70} | set(range(71, 76))


def test_no_timestamp_is_forced_if_text_is_equally_probable():
    logits = np.full((1, 120), -np.inf, "f")
    logits[0, [7, 119]] = 0.5  # after [75, 5, 118, 118, 6] the only timestamp left is 119
    assert 7 not in forbidden(TIMES, [61, 62, 66, 75, 5, 118, 118, 6], logits)
    logits[0, 119] = np.nextafter(np.float32(0.5), np.float32(1))
    assert 7 in forbidden(TIMES, [61, 62, 66, 75, 5, 118, 118, 6], logits)


def test_the_rules_equal_those_of_transformers():
    texts, lengths, logits = texts_and_logits()
    with np.load(FIXTURES / "forbidden.npz") as file:
        expected = np.unpackbits(file["forbidden"], axis=1, count=120).astype(bool)
    # All lengths in one batch; what stands behind a text is not read.
    out = jax.jit(TIMES)(texts, lengths, logits)
    np.testing.assert_array_equal(np.isneginf(out), expected)
    np.testing.assert_array_equal(np.asarray(out)[~expected], logits[~expected])


def test_suppressed_tokens():
    assert forbidden(SuppressTokens((3, 119)), [1, 2]) == {3, 119}
    assert forbidden(SuppressTokens(()), [1, 2]) == set()
    assert forbidden(SuppressAtBegin((5, 60), begin=2), [1, 2]) == {5, 60}
    assert forbidden(SuppressAtBegin((5, 60), begin=2), [1, 2, 3]) == set()
    rules = Rules((SuppressTokens((3,)), SuppressAtBegin((4,), begin=2)))
    assert forbidden(rules, [1, 2]) == {3, 4}


def test_equal_rules_need_no_new_trace():
    first, second = (load_settings(FIXTURES / "multilingual", module("multilingual").config) for _ in range(2))
    assert first == second
    for timestamps in (False, True):
        rules = [settings.rules(4, timestamps=timestamps) for settings in (first, second)]
        assert rules[0] == rules[1]
        assert hash(rules[0]) == hash(rules[1])


# Settings


def test_prompts_name_language_and_task():
    settings = load_settings(FIXTURES / "multilingual", module("multilingual").config)
    assert settings.prompt(language="de", task=None, timestamps=False) == (61, 63, 66, 70)
    assert settings.prompt(language="en", task="translate", timestamps=True) == (61, 62, 65)
    english = load_settings(FIXTURES / "english", module("english").config)
    start, none = english.start_token, english.no_timestamps_token
    assert english.prompt(language=None, task=None, timestamps=False) == (start, none)
    assert english.prompt(language=None, task=None, timestamps=True) == (start,)
    for each in (settings, english):
        for timestamps in (False, True):
            prompt = each.prompt(language="en" if each.languages else None, task=None, timestamps=timestamps)
            assert len(prompt) == each.prompt_length(timestamps=timestamps)


@pytest.mark.parametrize(
    ("name", "asked", "sentence"),
    [
        ("multilingual", {"language": "xx"}, "language must be one of de, en, fr, got 'xx'"),
        ("multilingual", {"language": None}, "language must be one of de, en, fr, got None"),
        ("multilingual", {"task": "sing"}, "task must be one of transcribe, translate, got 'sing'"),
        ("english", {"language": "en"}, "language must be left out for an English-only model, got 'en'"),
        ("english", {"language": None, "task": "translate"}, "task must be left out for an English-only model"),
    ],
)
def test_requests_that_a_checkpoint_does_not_support(name, asked, sentence):
    settings = load_settings(FIXTURES / name, module(name).config)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        settings.prompt(**{"language": "en", "task": None, "timestamps": False, **asked})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"suppress_tokens": [1, 172]}, "must be tokens from 0 to 171, vocab_size being 172; got 172"),
        ({"eos_token_id": None}, "must hold eos_token_id, which it does not"),
        ({"decoder_start_token_id": "<s>"}, "must be tokens from 0 to 171, vocab_size being 172; got '<s>'"),
        ({"lang_to_id": {}}, "must hold lang_to_id, because the model is multilingual"),
        ({"task_to_id": {"transcribe": None}}, "task_to_id.transcribe in"),
        ({"task_to_id": {"translate": 65}}, "must hold 'transcribe', got translate"),
        ({"is_multilingual": "yes"}, "must be true or false, got 'yes'"),
        ({"max_length": "long"}, "must be a whole number from 1 to 2147483647, got 'long'"),
        ({"max_initial_timestamp_index": 1.5}, "must be a whole number from 0 to 2147483647, got 1.5"),
        ({"suppress_tokens": {"a": 1}}, "must be tokens from 0 to 171, vocab_size being 172; got {'a': 1}"),
        ([], "must be a JSON object, got a list"),
        ("{", "must be a JSON object, but it cannot be parsed"),
        (None, "A Whisper checkpoint must hold generation_config.json, but there is no"),
    ],
)
def test_invalid_settings(change, sentence, tmp_path):
    file = tmp_path / "generation_config.json"
    shutil.copy(FIXTURES / "multilingual" / file.name, file)
    if isinstance(change, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    elif change is None:
        file.unlink()
    else:
        file.write_text(change if isinstance(change, str) else json.dumps(change))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_settings(tmp_path, module("multilingual").config)


def test_a_checkpoint_without_timestamps():
    settings = load_settings(FIXTURES / "multilingual", module("multilingual").config)
    without = settings.__class__(**{**vars(settings), "no_timestamps_token": None})
    assert without.prompt(language="en", task=None, timestamps=False) == (61, 62, 66)
    with pytest.raises(ValueError, match="timestamps need no_timestamps_token_id"):
        without.prompt(language="en", task=None, timestamps=True)
