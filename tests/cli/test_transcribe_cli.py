"""`specsamp transcribe`: standard output, standard error, and the sentence that reports a wrong option."""

import json
import re
import shutil
import wave

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from whisper_fixture import FIXTURES, LONG, SHORT

from specsamp_jax._types import Stats
from specsamp_jax.cli import shared
from specsamp_jax.cli import transcribe as transcribe_module
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.models import load_module, save_checkpoint
from specsamp_jax.speech import Fallback, Segment, Transcript, Transcription, Word, load_speech, load_wav, transcribe

pytestmark = pytest.mark.optimised(False)

TARGET, DRAFT = str(FIXTURES / "multilingual"), str(FIXTURES / "distilled")
ONCE = ["--temperature", "0", "--no-speech-threshold", "off"]


@pytest.fixture
def sounds(tmp_path):
    """Two WAV files of 16 bits."""
    files = [tmp_path / f"{name}.wav" for name in ("first", "second")]
    for path, samples in zip(files, (SHORT[0], LONG[0][:32_000]), strict=True):
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            file.writeframes((samples * 32767).astype("<i2").tobytes())
    return files


def test_text_goes_to_standard_output_and_all_else_to_standard_error(run, sounds):
    status, text, told = run("transcribe", *sounds, "--target", TARGET, "--draft", DRAFT, *ONCE)
    assert status == 0
    target = load_speech(TARGET)
    waveforms = [load_wav(path) for path in sounds]
    result = transcribe(jax.random.key(0), waveforms, target=target, draft=load_speech(DRAFT))
    expected = [f"{path}: {t.text}" for path, t in zip(sounds, result.transcripts, strict=True)]
    assert text.splitlines() == expected
    for words in (
        "the drafter uses the target's encoder, because theirs are equal",
        "3.3 of 3.3 s done",
        f"{sounds[0]}: the language is {result.transcripts[0].language}",
        f"{int(result.stats.num_emitted.sum())} tokens from 3.3 s of sound in ",
        " accepted; by position, given that all before were accepted: ",
    ):
        assert words in told


def test_each_segment_is_a_line_with_its_timestamps(run, sounds):
    options = ["--target", TARGET, "--timestamps", "--language", "en", "--max-new-tokens", "40", *ONCE]
    status, text, told = run("transcribe", sounds[1], *options, "--draft", "ngram", "--verify", "calibrated")
    assert status == 0
    assert "drafts are n-grams of the text" in told
    assert re.search(r"\d+ tokens drafted, \d+ accepted", told)
    rule = "the calibrated rule is approximate, but at temperature 0 every rule gives the same text"
    assert told.splitlines()[-1] == rule
    assert "the language is" not in told
    (transcript,) = transcribe(
        jax.random.key(0),
        [load_wav(sounds[1])],
        target=load_speech(TARGET),
        draft=None,
        language="en",
        timestamps="always",
        max_new_tokens=40,
    ).transcripts
    assert text.splitlines() == [f"[{s.start:.2f} - {s.end:.2f}] {s.text}" for s in transcript.segments]
    assert text.startswith("[0.")


def test_a_language_is_checked_before_the_weights_are_read(monkeypatch, run, sounds):
    monkeypatch.setattr(transcribe_module, "load_speech", None)  # a call would be a TypeError
    status, _, told = run("transcribe", sounds[0], "--target", TARGET, "--language", "frensh")
    assert status == 2
    assert "Did you mean 'french'" in told


def test_subtitles_and_json_are_written_for_each_sound(monkeypatch, run, sounds, tmp_path):
    heard = Transcript("One two.", (Segment(0.0, 1.0, "One"), Segment(1.0, 2.0, "two.")), np.zeros(0, np.int32), "en")
    arguments = {}

    def hear(_, waveforms, **options):
        arguments.update(options)
        counts = Stats(*map(jnp.zeros, ((), len(waveforms), 0, 0, len(waveforms))))
        return Transcription((heard,) * len(waveforms), counts._replace(status=jnp.zeros(len(waveforms), int)))

    monkeypatch.setattr(transcribe_module, "transcribe", hear)
    options = ["--target", TARGET, "--language", "EN-us"]
    srt = "1\n00:00:00,000 --> 00:00:01,000\nOne\n\n2\n00:00:01,000 --> 00:00:02,000\ntwo.\n"
    assert run("transcribe", sounds[0], *options, "--format", "srt")[1] == srt
    assert (arguments["language"], arguments["timestamps"]) == ("en", "always")
    written = [json.loads(line) for line in run("transcribe", *sounds, *options, "--format", "json")[1].splitlines()]
    assert [values["file"] for values in written] == list(map(str, sounds))
    assert written[0]["segments"][1] == {"start": 1.0, "end": 2.0, "text": "two."}
    folder = tmp_path / "new" / "folder"
    status, text, _ = run("transcribe", *sounds, *options, "--format", "vtt", "--output-dir", folder)
    assert (status, text) == (0, "")
    assert sorted(path.name for path in folder.iterdir()) == ["first.vtt", "second.vtt"]
    assert (folder / "first.vtt").read_text().startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.000\nOne\n")
    run("transcribe", *sounds, *options, "--output-dir", folder)
    assert (folder / "second.txt").read_text() == "One two.\n"
    assert arguments["timestamps"] == "auto"


@pytest.mark.parametrize(
    ("output_format", "expected"),
    [
        ("text", "[0.10 - 0.50] One\n[0.50 - 0.98] two.\n"),
        (
            "srt",
            "1\n00:00:00,100 --> 00:00:00,500\n<u>One</u> two.\n\n2\n00:00:00,500 --> 00:00:00,980\nOne <u>two.</u>\n",
        ),
        (
            "json",
            '{"file": "FILE", "language": "en", "text": "One two.", "segments": [{"start": 0.0, "end": 1.0, "text": '
            '"One two.", "words": [{"start": 0.1, "end": 0.5, "text": " One"}, {"start": 0.5, "end": 0.98, "text": '
            '" two."}]}]}\n',
        ),
    ],
)
def test_times_of_words_in_each_format(monkeypatch, run, sounds, output_format, expected):
    words = (Word(0.1, 0.5, " One"), Word(0.5, 0.98, " two."))
    heard = Transcript("One two.", (Segment(0.0, 1.0, "One two.", words),), np.zeros(0, np.int32), "en")
    arguments = {}

    def hear(_, waveforms, **options):
        arguments.update(options)
        counts = Stats(*map(jnp.zeros, ((), len(waveforms), 0, 0, len(waveforms))))
        return Transcription((heard,) * len(waveforms), counts._replace(status=jnp.zeros(len(waveforms), int)))

    monkeypatch.setattr(transcribe_module, "transcribe", hear)
    command = ["transcribe", sounds[0], "--target", TARGET, "--language", "en", "--word-timestamps"]
    assert run(*command, "--format", output_format)[1] == expected.replace("FILE", str(sounds[0]))
    assert arguments["timestamps"] == "word"


def test_a_folder_stands_for_its_sounds_and_the_time_left_is_shown(monkeypatch, run, sounds, tmp_path):
    (tmp_path / "notes.txt").write_text("no sound")
    heard = []

    def hear(_, waveforms, *, progress_fn, **__):
        heard.extend(waveforms)
        progress_fn(0.5, 3.3)
        progress_fn(3.3, 3.3)
        raise ValueError("enough")

    monkeypatch.setattr(transcribe_module, "transcribe", hear)
    told = run("transcribe", tmp_path, "--target", TARGET)[2]
    assert [len(waveform) for waveform in heard] == [len(load_wav(path)) for path in sounds]
    assert f"{tmp_path}: 2 sound files of 3 entries" in told
    assert re.search(r"0\.5 of 3\.3 s done, about \d+ s left", told)
    assert "3.3 of 3.3 s done\n" in told
    assert transcribe_module._progress(1.0, 4.0, 2.0) == "1.0 of 4.0 s done, about 6 s left"
    monkeypatch.setattr(shared, "stdout_is_terminal", lambda: False)
    assert "done" not in run("transcribe", tmp_path, "--target", TARGET)[2]


def test_a_draft_length_of_0_means_no_drafter(monkeypatch, run, sounds):
    calls = []
    monkeypatch.setattr(transcribe_module, "load_speech", lambda path, **_: calls.append(path) or load_speech(path))
    options = ["--target", TARGET, "--draft", DRAFT, "--num-draft", "0", "--language", "en", "--max-new-tokens", "4"]
    options += ONCE
    status, _, told = run("transcribe", sounds[0], *options)
    assert status == 0
    assert [str(path) for path in calls] == [TARGET]
    assert "there is no drafter: the target decodes alone" in told


@pytest.mark.parametrize(
    ("options", "first", "fallback"),
    [
        ([], 0, Fallback()),
        (["--temperature", "0.5"], 0.5, Fallback(temperatures=())),
        (["--temperature", "0, 1", "--no-speech-threshold", "off"], 0, Fallback((1.0,), no_speech_threshold=None)),
        (
            ["--logprob-threshold", "-2", "--compression-ratio-threshold", "off"],
            0,
            Fallback(Fallback().temperatures, None, -2.0),
        ),
    ],
)
def test_windows_are_judged_by_the_published_thresholds_by_default(monkeypatch, run, sounds, options, first, fallback):
    calls = []

    def hear(*_, **arguments):
        calls.append(arguments)
        raise ValueError("enough")

    monkeypatch.setattr(transcribe_module, "transcribe", hear)
    assert run("transcribe", sounds[0], "--target", TARGET, *options)[0] == 2
    ((chosen, sampling),) = [(call["fallback"], call["sampling"]) for call in calls]
    assert sampling.temperature == first
    assert chosen == fallback


def test_a_drafter_with_another_encoder_is_reported(tmp_path, capsys):
    other = shutil.copytree(DRAFT, tmp_path / "other")
    module = load_module(DRAFT)
    module.encoder.norm.bias.set_value(module.encoder.norm.bias[...] + 1)
    save_checkpoint(other, module, dtype="float32")
    target, drafter = transcribe_module._load(FIXTURES / "multilingual", str(other), "float32")
    assert drafter is not None
    assert drafter.module.encoder is not target.module.encoder
    differs = "model.encoder.layer_norm.bias differs"
    assert f"the drafter's own encoder runs, too, because it is another: {differs}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Missing argument 'AUDIO...'."),
        (["SOUND"], "Missing option '--target'."),
        (["nowhere.wav", "--target", TARGET], "nowhere.wav cannot be read: No such file or directory."),
        ([FIXTURES, "--target", TARGET], "whisper must hold sound files, whose names end with .wav, .flac, "),
        (["/dev/zero", "--target", TARGET], "/dev/zero must be a regular file, got a device."),
        (["SOUND", "--target", TARGET, "--temperature", "nan"], "'--temperature': nan is not a finite number."),
        (["SOUND", "--target", TARGET, "--temperature", "0,x"], "'--temperature': 'x' is not a valid float"),
        (["SOUND", "--target", TARGET, "--logprob-threshold", "nan"], "'nan' is not a finite number or 'off'."),
        (["SOUND", "--target", "nowhere"], "--target must be a folder, but there is no nowhere."),
        (
            ["SOUND", "--target", TARGET, "--draft", "nowhere"],
            "--draft must be a folder or 'ngram', but there is no no",
        ),
        (["SOUND", "--target", TARGET, "--draft", "ngrams"], "there is no ngrams; did you mean 'ngram'?"),
        (
            ["SOUND", "--target", ASSETS / "target"],
            "--target must hold a Whisper, got model_type 'llama'; `specsamp generate` is for text.",
        ),
        (["SOUND", "--target", TARGET, "--language", "xx"], "language must be one of de, en, fr, got 'xx'."),
        (["SOUND", "--target", TARGET, "--language", "Englich"], "got 'Englich'. Did you mean 'english'"),
        (["SOUND", "other.wav", "--target", TARGET, "--format", "srt"], "'--format srt' of several files needs '--out"),
        (["SOUND", "SOUND", "--target", TARGET, "--output-dir", "."], "have the same name in '--output-dir'."),
        (["SOUND", "--target", TARGET, "--task", "sing"], "'sing' is not one of 'transcribe', 'translate'."),
        (
            ["SOUND", "--target", TARGET, "--verify", "block"],
            "'--verify block' decides drafts, and there is no drafter.",
        ),
        (["SOUND", "--target", TARGET, "--num-draft", "-1"], "-1 is not in the range 0<=x<=32."),
        (
            ["SOUND", "--target", str(FIXTURES / "english"), "--draft", DRAFT],
            "vocab_size of the drafter must be the target's, 1569; got 172.",
        ),
        (
            ["SOUND", "--target", str(FIXTURES / "english"), "--task", "translate"],
            "task must be left out for an English-only model, got 'translate'.",
        ),
    ],
)
def test_a_wrong_option_is_reported_in_one_sentence(run, sounds, arguments, sentence):
    status, text, told = run("transcribe", *(sounds[0] if argument == "SOUND" else argument for argument in arguments))
    assert status == 2
    assert text == ""
    assert told.splitlines()[-1].startswith("specsamp: ")
    assert sentence in told.splitlines()[-1]


def test_damaged_weights_are_reported(run, sounds, tmp_path):
    folder = shutil.copytree(TARGET, tmp_path / "nan")
    module = load_module(TARGET)
    module.decoder.norm.weight.set_value(module.decoder.norm.weight[...] * float("nan"))
    save_checkpoint(folder, module, dtype="float32")
    status, text, messages = run("transcribe", *sounds, "--target", folder, "--language", "en", "--max-new-tokens", "4")
    assert (status, text) == (1, "")
    assert messages.splitlines()[-1].startswith("specsamp: the target's logits for file 1, 2 hold NaN or +inf")
