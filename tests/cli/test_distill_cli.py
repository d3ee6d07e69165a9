"""`specsamp distill`: what it writes, and the one sentence that a wrong option gets."""

import json

import pytest
from fixture_files import FIXTURES
from text_target import write_target

from specsamp_jax import train
from specsamp_jax.models import load_module

pytestmark = pytest.mark.optimised(False)

LLAMA, WHISPER = FIXTURES / "decoders/llama", FIXTURES / "whisper/multilingual"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--steps", "2", "--minutes", "1"], "--steps or --minutes must be given, and not both."),
        (["--target", "nowhere"], "--target must be a folder, but there is no nowhere."),
        (["--ratio", "0.5", "--layers", "1"], "--ratio must be given without --hidden-size and --layers"),
        (["--from-layers", "0", "--layers", "1"], "--layers or --from-layers must be given, and not both."),
        (["--from-layers", "0", "--ratio", "0.5"], "--from-layers must be left out with --hidden-size or --ratio"),
        (["--from-layers", "0,x"], "'0,x' must be layers such as 0,5."),
        (["--target", WHISPER, "--hidden-size", "8"], "--hidden-size must be left out for a Whisper"),
        (["--target", WHISPER], "The data must hold files ending in .wav, .flac, .ogg, .oga, .opus or .mp3;"),
        (["--held-out", "0"], "'--held-out': 0.0 is not in the range 0<x<1."),
        (["--layers", "9"], "layers must be from 1 to 2, the target's number; got 9."),
    ],
)
def test_a_wrong_option_gets_one_sentence(run, tmp_path, options, sentence):
    (tmp_path / "text.txt").write_text("text")
    status, text, told = run("distill", tmp_path, "--target", LLAMA, "--out", tmp_path / "out", *options)
    assert (status, text) == (2, "")
    assert sentence in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("klingon", "language must be one of "),
        ("English", "a.wav must be WAV, FLAC, Ogg or MP3, but soundfile cannot read it: Format not recognised."),
    ],
)
def test_a_language_is_understood_before_sounds_are_read(run, tmp_path, language, sentence):
    pytest.importorskip("soundfile")
    (tmp_path / "a.wav").write_bytes(b"no sound")
    options = ["--target", WHISPER, "--out", tmp_path / "out", "--language", language]
    status, _, told = run("distill", tmp_path, *options)
    assert (status, sentence in told) == (2, True)


def test_a_drafter_learns_and_loads(run, tmp_path):
    (tmp_path / "target").mkdir()
    target, out = write_target(tmp_path / "target"), tmp_path / "out"
    options = ["--steps", 60, "--length", 8, "--batch-size", 4, "--hidden-size", 8, "--layers", 1, "--held-out", 0.3]
    status, line, told = run("distill", target, "--target", target, "--out", out, "--learning-rate", 0.01, *options)
    assert status == 0, told
    assert "training" in told
    report = json.loads((out / "report.json").read_text())
    assert f"accepts {report['acceptance_rate']:.3f} of the drafts" in line
    assert report["acceptance_rate"] > 0.3
    config = load_module(out).config
    assert (config.hidden_size, config.num_hidden_layers) == (8, 1)
    assert (out / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()


def test_an_interrupted_training_says_how_it_continues(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("text")
    command = "distill", tmp_path, "--target", LLAMA, "--out", tmp_path / "out", "--verbose"

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "distill_text", interrupted)
    assert run(*command) == (130, "", "\n")
    (tmp_path / "out" / "training").mkdir(parents=True)
    (tmp_path / "out" / "training" / "state.npz").touch()
    status, text, told = run(*command)
    assert (status, text) == (130, "")
    assert told == f"interrupted; the same command continues from the checkpoint in {tmp_path / 'out' / 'training'}\n\n"
