"""Silent windows, and windows that are decoded again at higher temperatures."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whisper_fixture import FIXTURES, LONG, SHORT

from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.speech import Fallback, load_speech, transcribe, transcription
from specsamp_jax.speech.fallback import AGAIN, KEEP, SILENT, compression_ratio, judge, mean_log_probs

pytestmark = pytest.mark.optimised(False)

KEY = jax.random.key(0)
NEVER = Fallback(no_speech_threshold=None, logprob_threshold=None, compression_ratio_threshold=None)
WORDS, LOOP = "Agents are busy, please hold the line.", "and then " * 20


@functools.cache
def target():
    return load_speech(FIXTURES / "multilingual")


def hear(sounds, **options):
    options = {"language": "en", "max_new_tokens": 8, "batch_size": 1, "draft": None, "timestamps": "never", **options}
    return transcribe(KEY, sounds, target=target(), **options)


@pytest.mark.parametrize(
    ("fallback", "text", "log_prob", "no_speech", "verdict"),
    [
        (Fallback(), WORDS, -0.9, 0.9, KEEP),  # probable words are speech, whatever the first token says
        (Fallback(), WORDS, -1.1, 0.7, SILENT),
        (Fallback(), WORDS, -1.1, 0.5, AGAIN),
        (Fallback(), LOOP, -0.1, 0.5, AGAIN),
        (Fallback(), LOOP, -0.1, 0.7, AGAIN),
        (Fallback(), LOOP, -1.1, 0.7, SILENT),
        (Fallback(), "", -0.1, 0.5, KEEP),
        (Fallback(logprob_threshold=None), WORDS, -9.0, 0.5, KEEP),
        (Fallback(logprob_threshold=None), WORDS, -0.1, 0.7, SILENT),
        (Fallback(compression_ratio_threshold=None), LOOP, -0.1, 0.5, KEEP),
        (Fallback(no_speech_threshold=None), WORDS, -1.1, 1.0, AGAIN),
        (NEVER, LOOP, -9.0, 1.0, KEEP),
    ],
)
def test_verdicts(fallback, text, log_prob, no_speech, verdict):
    assert judge(fallback, text, log_prob, no_speech) == verdict


def test_a_ratio_counts_bytes_of_utf_8():
    assert compression_ratio("") == 0
    assert compression_ratio(WORDS) < 1 < 2.4 < compression_ratio(LOOP)
    # 80 bytes, of which zlib makes 10 to 16; as characters they would be half as many.
    assert 5 <= compression_ratio("\u00e9" * 40) <= 8


def test_mean_log_probs_are_those_of_the_processed_logits_one_by_one():
    whisper = target()
    features = np.stack([transcription.FixedWindows(sound, whisper.module.config).features(0) for sound in SHORT[:2]])
    model = decoder_model(whisper.module, encode(whisper.module, features))
    prompt, rules = (61, 62, 66), whisper.settings.rules(3, timestamps=False)
    tokens = np.full((2, 45), -1, np.int32)
    tokens[:, :3] = prompt
    tokens[0, 3:40] = [71, *range(10, 45), 60]  # more tokens than are scored at once
    tokens[1, 3:6] = [75, 20, 60]
    lengths = np.array([40, 6], np.int32)
    shown = jnp.maximum(tokens, 0)
    positions = jnp.broadcast_to(jnp.arange(45), (2, 45))
    logits, _ = jax.jit(model.apply_fn)(model.params, shown, positions, model.init_cache_fn(2, 45))
    expected = []
    for row, length in enumerate(lengths.tolist()):
        ends = np.arange(3, length)
        processed = jax.jit(rules)(
            jnp.broadcast_to(shown[row], (ends.size, 45)), jnp.asarray(ends), logits[row, ends - 1]
        )
        expected.append(jax.nn.log_softmax(processed)[np.arange(ends.size), tokens[row, ends]].mean())
    np.testing.assert_allclose(mean_log_probs(model, tokens, lengths, 3, rules), expected, rtol=1e-4)


def test_measures_verdicts_and_starts_of_windows_are_those_of_transformers():
    made = json.loads((FIXTURES / "measures.json").read_text())  # by fixtures/make_measures_fixture.py
    whisper, fallback = target(), Fallback(**made["thresholds"])
    prompt = np.array([whisper.settings.prompt(language="en", task="transcribe", timestamps=True)])
    begin, rules = prompt.shape[1], whisper.settings.rules(prompt.shape[1], timestamps=True)
    verdicts = []
    for sound, attempts in zip(LONG, made["attempts"], strict=True):
        windows = transcription.SlidingWindows(sound, whisper.module.config, whisper.settings.first_timestamp)
        start = 0
        for attempt in attempts:
            assert attempt["start"] == start
            model = decoder_model(whisper.module, encode(whisper.module, windows.features(start)[None]))
            text = np.array([attempt["tokens"]])
            tokens = np.pad(np.concatenate([prompt, text], 1), ((0, 0), (0, 100 - begin - text.size)))
            log_prob = float(mean_log_probs(model, tokens, np.array([begin + text.size]), begin, rules)[0])
            no_speech = transcription._first_probs(model, whisper.settings.start_token, 1)
            no_speech = float(no_speech[0, whisper.settings.no_speech_token])
            np.testing.assert_allclose([log_prob, no_speech], [attempt["log_prob"], attempt["no_speech"]], rtol=1e-3)
            verdicts.append(judge(fallback, "", log_prob, no_speech))
            assert verdicts[-1] == attempt["verdict"]
            if verdicts[-1] != AGAIN or attempt["temperature"] == 1:
                text = text[text != whisper.settings.end_tokens[0]]
                start = windows.split(text[:0] if verdicts[-1] == SILENT else text, start)[1]
        assert start is None
    assert set(verdicts) == {KEEP, AGAIN, SILENT}


def test_a_silent_window_has_no_text():
    plain, judged = hear(SHORT[:1]), hear(SHORT[:1], fallback=NEVER)
    assert [t.tokens.tolist() for t in judged.transcripts] == [t.tokens.tolist() for t in plain.transcripts]
    assert (judged.num_silent, judged.num_again) == (0, 0)
    silent = hear(SHORT[:1], fallback=NEVER._replace(no_speech_threshold=-1.0))
    assert [(t.text, t.segments, t.tokens.size) for t in silent.transcripts] == [("", (), 0)]
    assert (silent.num_silent, silent.num_again) == (1, 0)


def test_a_window_without_any_sound_has_no_text_where_silence_is_looked_for():
    zeros = np.zeros(20_000, "f")
    assert hear([zeros]).transcripts[0].text == hear([zeros], fallback=NEVER).transcripts[0].text != ""
    result = hear([zeros], fallback=NEVER._replace(no_speech_threshold=2.0))
    assert (result.transcripts[0].text, result.num_silent) == ("", 1)
    # In a longer sound, too, and after its end.
    config, sound = target().module.config, np.concatenate([SHORT[0], np.zeros(50_000, "f")])
    windows = transcription.SlidingWindows(sound, config, 71)
    assert [windows.is_empty(start) for start in (0, 100, 140, 300)] == [False, False, True, True]


def test_a_doubtful_window_is_decoded_at_each_temperature_in_turn(monkeypatch):
    calls, generate = [], transcription.generate

    def record(keys, prompts, **arguments):
        calls.append((jax.random.key_data(keys).tolist(), arguments["sampling"].temperature.tolist()))
        return generate(keys, prompts, **arguments)

    # The first of two utterances is always doubtful, the second never.
    doubtful, good = (transcript.text for transcript in hear(SHORT[:2]).transcripts)
    assert doubtful != good
    monkeypatch.setattr(transcription, "generate", record)
    monkeypatch.setattr(transcription, "judge", lambda _, text, *__: KEEP if text.strip() == good else AGAIN)
    result = hear(SHORT[:2], fallback=Fallback(temperatures=(0.5, 1.0)))
    assert [call[1] for call in calls] == [[0.0], [0.5], [1.0], [0.0]]
    assert len({tuple(row) for call in calls for row in call[0]}) == 4  # each attempt draws anew
    assert result.num_again == 2
    first, second = result.transcripts
    assert second.text == good
    assert first.text != doubtful
    emitted = result.stats.num_emitted
    assert emitted[0] > emitted[1]  # all attempts are counted


@pytest.mark.parametrize(
    ("fallback", "sentence"),
    [
        (Fallback(temperatures=(-1.0,)), "temperatures of the fallback must be finite and at least 0; got -1.0"),
        (Fallback(logprob_threshold=float("nan")), "logprob_threshold must be a finite number, or None"),
    ],
)
def test_a_wrong_fallback_raises_an_error(fallback, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        hear(SHORT, fallback=fallback)
