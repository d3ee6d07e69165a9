"""Transcripts equal those of the transformers library token by token, with any drafter or none."""

import dataclasses
import functools
import inspect
import json
import re
import shutil
from itertools import chain

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whisper_fixture import FIXTURES, LONG, SHORT, generated, waveform

import specsamp_jax as ss
from specsamp_jax.decoding import generate as generate_module
from specsamp_jax.speech import Speech, load_speech, transcribe, transcription

pytestmark = pytest.mark.optimised(False)

KEY = jax.random.key(0)


@functools.cache
def speech(name):
    return load_speech(FIXTURES / name)


def with_its_own_encoder():
    """A drafter whose encoder is not the target's."""
    other = load_speech(FIXTURES / "distilled")
    kernel = other.module.encoder.conv1.kernel
    kernel.set_value(kernel[...] * 1.5)
    return other


# All temperatures that are arrays use one compiled step.
GREEDY, SAMPLED = (ss.SamplingParams(jnp.float32(temperature)) for temperature in (0.0, 0.7))
DRAFTERS = {"alone": lambda: None, "distilled": lambda: speech("distilled"), "n-grams": ss.NGramDrafter}


def expected_tokens(rows, num_prompt, end):
    """Tokens of the transformers library, without the prompt and from the end token on."""
    return [row[num_prompt:][: [*row[num_prompt:], end].index(end)] for row in rows]


def tokens(result):
    return [transcript.tokens.tolist() for transcript in result.transcripts]


@pytest.mark.parametrize(
    "name", ["distilled", *(pytest.param(name, marks=pytest.mark.slow) for name in ("alone", "n-grams"))]
)
def test_tokens_are_those_of_transformers(name):
    """Three utterances of 0.7 to 2 seconds: up to 96 tokens each; some end earlier."""
    drafter = DRAFTERS[name]()
    options = {"sampling": GREEDY} if name == "distilled" else {}
    hear = functools.partial(transcribe, KEY, SHORT, target=speech("multilingual"), draft=drafter, **options)
    theirs = generated("multilingual")
    lengths = set()
    for asked, rows in theirs["texts"].items():
        language, task = asked.split()
        result = hear(language=language, task=task)
        assert tokens(result) == expected_tokens(rows, 4, 60)
        lengths |= set(map(len, tokens(result)))
    assert max(lengths) == 96
    assert min(lengths) < 40
    detected = hear()
    assert tokens(detected) == expected_tokens(theirs["detected"], 4, 60)
    assert [62 + ["en", "de", "fr"].index(t.language) for t in detected.transcripts] == theirs["languages"]
    if drafter is not None:
        accepted, drafted = detected.stats.num_accepted, detected.stats.num_drafted
        assert 0 < accepted[-1] < accepted[0] < drafted[0]


def test_long_audio_is_cut_at_the_timestamps_of_transformers():
    draft = speech("distilled")
    result = transcribe(KEY, LONG, target=speech("multilingual"), draft=draft, language="en", timestamps="always")
    for transcript, theirs in zip(result.transcripts, generated("multilingual")["segments"], strict=True):
        ours = [(segment.start, segment.end) for segment in transcript.segments]
        np.testing.assert_allclose(ours, [(s["start"], s["end"]) for s in theirs], rtol=0, atol=1e-6)
        # Where a window ends with a pair of timestamps, transformers keeps both.
        rows = [s["tokens"][:-1] if min(s["tokens"][-2:]) >= 71 else s["tokens"] for s in theirs]
        assert transcript.tokens.tolist() == list(chain.from_iterable(rows))
    assert len({segment.end for segment in result.transcripts[0].segments}) > 3


def test_timestamps_are_the_default_for_sounds_longer_than_a_window():
    hear = functools.partial(
        transcribe, KEY, target=speech("multilingual"), draft=None, language="en", max_new_tokens=8, batch_size=1
    )
    auto = hear([LONG[1], SHORT[0]])
    assert tokens(auto) == [*tokens(hear([LONG[1]], timestamps="always")), *tokens(hear([SHORT[0]]))]
    assert tokens(auto)[0][0] >= 71
    assert [segment.start for segment in auto.transcripts[0].segments] != [0.0, 2.0]
    assert auto.transcripts[1].segments[0][:2] == (0.0, 1.3)


def test_adjacent_windows_are_for_sounds_of_a_window_and_checkpoints_without_timestamps():
    target, long, exact = speech("multilingual"), LONG[1], LONG[0][:32_000]
    without = target._replace(settings=dataclasses.replace(target.settings, no_timestamps_token=None))

    def timed(sound, target, timestamps):
        return transcription._sound("sound", sound, target, timestamps).timestamps

    assert [timed(sound, target, "auto") for sound in (exact, long)] == [False, True]
    assert [timed(sound, target, "always") for sound in (exact, long)] == [True, True]
    assert [timed(sound, target, "never") for sound in (exact, long)] == [False, False]
    assert not timed(long, without, "auto")


def test_an_english_model_with_windows_of_30_seconds():
    theirs = generated("english")
    result = transcribe(KEY, SHORT[:2], target=speech("english"), draft=ss.NGramDrafter())
    end = speech("english").settings.end_tokens[0]
    assert tokens(result) == expected_tokens(theirs["texts"], 2, end)
    assert len(tokens(result)[0]) > 64
    assert [transcript.language for transcript in result.transcripts] == [None, None]


def test_a_drafter_with_its_own_encoder_changes_no_token():
    other = with_its_own_encoder()
    hear = functools.partial(transcribe, KEY, SHORT, target=speech("multilingual"), language="en", sampling=GREEDY)
    result = hear(draft=other)
    assert other.module.encoder is not speech("multilingual").module.encoder
    assert tokens(result) == expected_tokens(generated("multilingual")["texts"]["en transcribe"], 4, 60)
    shared = speech("distilled")
    again = hear(draft=shared)
    assert tokens(again) == tokens(result)
    assert again.stats.num_accepted.tolist() != result.stats.num_accepted.tolist()  # other drafts
    assert shared.module.encoder is speech("multilingual").module.encoder


def test_windows_of_one_sound_are_transcribed_as_utterances():
    sounds = [waveform(6, 3.9), waveform(7, 1.1)]
    parts = [sounds[0][:32_000], sounds[1], sounds[0][32_000:]]
    seen = []
    hear = functools.partial(transcribe, KEY, target=speech("multilingual"), draft=None, timestamps="never")
    whole = hear(sounds, batch_size=1, progress_fn=lambda *seconds: seen.append([round(s, 6) for s in seconds]))
    assert seen == [[2.0, 5.0], [3.1, 5.0], [5.0, 5.0]]
    # The language detected in the first window is used in the second.
    (code, other), (first, second) = (t.language for t in whole.transcripts), whole.transcripts
    alone = [hear(parts, language=language).transcripts for language in (code, other)]
    assert first.tokens.tolist() == [*alone[0][0].tokens, *alone[0][2].tokens]
    assert first.text == alone[0][0].text + alone[0][2].text
    assert second.tokens.tolist() == alone[1][1].tokens.tolist()
    assert [segment[:2] for segment in first.segments] == [(0.0, 2.0), (2.0, 3.9)]
    assert whole.stats.num_emitted.shape == (2,)
    # All windows in one batch.
    assert tokens(hear(sounds)) == tokens(whole)


def test_the_last_batches_are_halves_of_the_batch_size():
    assert [transcription._fitting(8, left) for left in (9, 8, 7, 4, 3, 2, 1)] == [8, 8, 4, 4, 2, 2, 1]
    assert [transcription._fitting(5, left) for left in (5, 4, 3, 2, 1)] == [5, 3, 3, 2, 1]


def test_a_step_is_traced_once_for_all_utterances_of_a_shape():
    hear = functools.partial(transcribe, draft=speech("distilled"), sampling=GREEDY)
    hear(KEY, SHORT, target=speech("multilingual"), language="en")
    before = generate_module._generate._cache_size()
    hear(jax.random.key(5), SHORT[::-1], target=load_speech(FIXTURES / "multilingual"), language="de")
    assert generate_module._generate._cache_size() == before


def test_a_sampled_text_depends_on_its_key_and_its_window_alone():
    hear = functools.partial(
        transcribe,
        target=speech("multilingual"),
        timestamps="never",
        draft=speech("distilled"),
        language="en",
        sampling=SAMPLED,
    )
    keys = jax.random.split(KEY, 3)
    together = tokens(hear(keys, SHORT))
    assert tokens(hear(keys[::-1], SHORT[::-1])) == together[::-1]
    assert tokens(hear(jax.random.split(jax.random.key(1), 3), SHORT)) != together
    # Two windows of one sound draw differently, and those of another utterance draw as before.
    first, second = hear(keys[1:], [np.tile(SHORT[1], 2), SHORT[2]]).transcripts
    (_, one), (_, other) = ((segment.start, segment.text) for segment in first.segments)
    assert one != other
    assert first.tokens[: len(together[1])].tolist() == together[1]
    assert second.tokens.tolist() == together[2]


def test_the_text_is_the_decoded_tokens_without_special_ones():
    target = speech("multilingual")
    result = transcribe(KEY, SHORT, target=target, draft=None, language="en")
    for transcript in result.transcripts:
        spoken = [token for token in transcript.tokens.tolist() if token < 60]
        assert transcript.text == target.tokenizer.decode(spoken).strip()
        assert "<|" not in transcript.text
        assert len(spoken) > 3


def test_no_sounds_and_an_empty_sound_have_empty_transcripts():
    target = speech("multilingual")
    assert transcribe(KEY, [], target=target, draft=None).transcripts == ()
    (silent,) = transcribe(KEY, [np.zeros(0, "f")], target=target, draft=None).transcripts
    assert (silent.text, silent.segments, silent.tokens.size) == ("", (), 0)


# Errors


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"draft": lambda: speech("english")}, "vocab_size of the drafter must be the target's, 172; got 1569"),
        ({"language": "xx"}, "language must be one of"),
        ({"max_new_tokens": 97}, "max_new_tokens must be from 1 to 96, the model's limit; got 97"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to 96, the model's limit; got 0"),
        ({"sampling": ss.SamplingParams(np.zeros(3))}, "sampling must hold scalars"),
        ({"timestamps": "yes"}, "timestamps must be one of auto, always, never, word; got 'yes'"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"waveforms": [np.zeros(9, int)]}, "waveforms[0] must be a floating-point array of shape [N]"),
        ({"waveforms": [np.zeros(9, "f"), np.full(9, np.inf, "f")]}, "waveforms[1] must be finite"),
    ],
)
def test_a_wrong_argument_raises_an_error(options, sentence):
    options = {"waveforms": SHORT, "draft": lambda: None, **options}
    options["draft"] = options["draft"]()
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inspect.unwrap(transcription.transcribe)(KEY, target=speech("multilingual"), **options)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", None, "A checkpoint must hold tokenizer.json, but there is no"),
        ("tokenizer.json", "{}", "tokenizer.json is no tokenizer: "),
        ("preprocessor_config.json", '{"feature_size": 128}', "preprocessor_config.json must be 80, got 128"),
        ("preprocessor_config.json", '{"chunk_length": 30}', "preprocessor_config.json must be 2, got 30"),
        ("preprocessor_config.json", "[", "must be a JSON object, but it cannot be parsed"),
        ("config.json", None, "A checkpoint must hold config.json"),
        ("config.json", '{"model_type": "whisper"}', "encoder_layers in"),
        (
            "config.json",
            json.dumps(
                {**json.loads((FIXTURES / "distilled" / "config.json").read_text()), "max_source_positions": 10**12}
            ),
            "model.encoder.embed_positions.weight must have shape (1000000000000, ",
        ),
    ],
)
def test_a_broken_folder_raises_an_error(tmp_path, file, content, sentence):
    folder = shutil.copytree(FIXTURES / "distilled", tmp_path / "whisper")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_speech(folder)


def test_the_settings_of_the_features_may_be_missing_and_another_model_raises_an_error(tmp_path):
    folder = shutil.copytree(FIXTURES / "distilled", tmp_path / "whisper")
    (folder / "preprocessor_config.json").unlink()
    assert isinstance(load_speech(folder), Speech)
    with pytest.raises(ValueError, match="must hold a Whisper, got a Llama"):
        load_speech(FIXTURES.parent / "decoders" / "llama_tied")
