"""Sound files that the package soundfile reads, and folders of sounds."""

import io
import re
import sys

import numpy as np
import pytest

from specsamp_jax.speech import load_audio, load_wav, sound_files

RATE = 8_000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype("f")


def encoded(suffix, samples=TONE, subtype=None):
    soundfile = pytest.importorskip("soundfile")
    content = io.BytesIO()
    soundfile.write(content, samples, RATE, format=suffix.upper(), subtype=subtype)
    return content.getvalue()


@pytest.mark.parametrize(
    ("suffix", "subtype", "error"), [("flac", None, 1e-4), ("ogg", "VORBIS", 0.1), ("mp3", None, 0.1)]
)
def test_compressed_sounds_are_resampled_as_wav_is(tmp_path, suffix, subtype, error):
    stereo = np.stack([1.5 * TONE, 0.5 * TONE], axis=1)
    (tmp_path / "sound").write_bytes(encoded(suffix, stereo, subtype))
    (tmp_path / "sound.wav").write_bytes(encoded("wav", TONE))
    sound, expected = load_audio(tmp_path / "sound"), load_wav(tmp_path / "sound.wav")
    assert sound.dtype == np.float32
    assert abs(sound.size - expected.size) <= 0.2 * expected.size  # MP3 has blocks, with silence at their ends
    loudness = np.sqrt(np.mean(sound[2000:12000] ** 2)) / np.sqrt(np.mean(expected[2000:12000] ** 2))
    assert loudness == pytest.approx(1, abs=max(error, 1e-3))
    if suffix == "flac":
        np.testing.assert_allclose(sound, expected, rtol=0, atol=error)


def test_wav_needs_no_package_and_others_say_which(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC and more")
    with pytest.raises(ValueError, match=r"need the package soundfile, .* install specsamp\[audio\], or convert"):
        load_audio(tmp_path / "a.flac")
    (tmp_path / "a.wav").write_bytes(b"RIFF\4\0\0\0WAVE")
    with pytest.raises(ValueError, match="must hold a chunk 'fmt '"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(ValueError, match=re.escape("nowhere.mp3 cannot be read: No such file")):
        load_audio(tmp_path / "nowhere.mp3")


def test_a_file_that_holds_no_sound_raises_an_error(tmp_path, monkeypatch):
    content = encoded("flac")
    for damaged in (b"a text", content[:20]):
        (tmp_path / "a.flac").write_bytes(damaged)
        with pytest.raises(ValueError, match="must be WAV, FLAC, Ogg or MP3, but soundfile cannot read it: "):
            load_audio(tmp_path / "a.flac")
    (tmp_path / "a.flac").write_bytes(content)
    monkeypatch.setattr(sound_files, "_MAX_SAMPLES", RATE - 1)
    with pytest.raises(ValueError, match="must hold from 1 to 7,999 samples, got 8,000"):
        load_audio(tmp_path / "a.flac")


def test_a_folder_stands_for_its_sounds(tmp_path):
    for name in ("b.WAV", "a.mp3", "notes.txt", "c.opus"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.wav").mkdir()
    other = tmp_path / "notes.txt"
    found = sound_files.find_sounds([other, tmp_path])
    assert [path.name for path in found] == ["notes.txt", "a.mp3", "b.WAV", "c.opus"]
    with pytest.raises(ValueError, match=r"must hold sound files, whose names end with \.wav, .*; it holds none"):
        sound_files.find_sounds([tmp_path / "d.wav"])
