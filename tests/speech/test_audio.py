"""Reading WAV files of every format, and resampling."""

import inspect
import os
import re
import struct
import wave

import numpy as np
import pytest

from specsamp_jax.speech import load_wav, resample


def riff(format_tag, bits, data, channels=1, rate=16_000, *, between=b"", size=None, extensible=False):
    frame = channels * bits // 8
    described = struct.pack("<HHIIHH", 0xFFFE if extensible else format_tag, channels, rate, rate * frame, frame, bits)
    if extensible:
        described += struct.pack("<HHIH", 22, bits, 0, format_tag) + b"\x00" * 14
    chunks = b"fmt " + struct.pack("<I", len(described)) + described + between
    chunks += b"data" + struct.pack("<I", len(data) if size is None else size) + data
    return b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks


def load(tmp_path, content):
    file = tmp_path / "sound.wav"
    file.write_bytes(content)
    return load_wav(file)


SAMPLES = np.array([0, 0.5, -0.5, -1, 127 / 128])
WIDE = (SAMPLES * 2**31).astype("<i4")
ENCODED = {
    (1, 8): (SAMPLES * 128 + 128).astype(np.uint8).tobytes(),
    (1, 16): (SAMPLES * 2**15).astype("<i2").tobytes(),
    (1, 24): WIDE.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes(),
    (1, 32): WIDE.tobytes(),
    (3, 32): SAMPLES.astype("<f4").tobytes(),
    (3, 64): SAMPLES.astype("<f8").tobytes(),
}


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("kind", ENCODED)
def test_every_format_of_samples_is_read(tmp_path, kind, extensible):
    sound = load(tmp_path, riff(*kind, ENCODED[kind], extensible=extensible))
    assert sound.dtype == np.float32
    np.testing.assert_array_equal(sound, SAMPLES.astype("f"))


def test_channels_are_averaged_and_other_chunks_are_skipped(tmp_path):
    stereo = np.array([[0.5, 0.25], [-1.0, 0.0]], "<f4").tobytes()
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\x00"
    np.testing.assert_array_equal(load(tmp_path, riff(3, 32, stereo, 2, between=odd)), np.array([0.375, -0.5], "f"))


def test_files_from_the_standard_library_and_from_a_pipe_are_read(tmp_path):
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(ENCODED[1, 16])
    np.testing.assert_array_equal(load_wav(tmp_path / "a.wav"), SAMPLES.astype("f"))
    np.testing.assert_array_equal(load(tmp_path, riff(1, 16, ENCODED[1, 16], size=0xFFFFFFFF)), SAMPLES.astype("f"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"ID3\x04 an mp3, say", "must be a WAV file, but does not begin as one"),
        (b"RIFF\x04\0\0\0WAVE", "must hold a chunk 'fmt ', which is missing"),
        (riff(1, 16, ENCODED[1, 16])[:-1], "is cut off: its chunk 'data' must have 10 bytes, got 9"),
        (riff(7, 8, b"ulaw"), "must be PCM of 8, 16, 24 or 32 bits or floats of 32 or 64, got format 7 of 8 bits"),
        (riff(1, 16, b"", channels=0), "must have frames of one sample per channel: got 0 channels"),
        (riff(3, 32, np.array([0, np.nan], "<f4").tobytes()), "must be finite, but holds NaN or infinity"),
        (riff(3, 64, np.array([0, 1e300], "<f8").tobytes()), "must be finite, but holds NaN or infinity"),
    ],
)
def test_a_file_that_holds_no_sound_raises_an_error(tmp_path, content, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(tmp_path, content)


@pytest.mark.parametrize("rate", [0, 1, 2, 999, 768_001, 2**31, 2**32 - 1])
def test_an_impossible_sample_rate_raises_an_error(tmp_path, rate):
    with pytest.raises(ValueError, match=rf"must have a sample rate from 1,000 to 768,000 per second, got {rate:,}\."):
        load(tmp_path, riff(1, 8, b"\x80" * 100, rate=rate))


@pytest.mark.parametrize("rate", [8_000, 16_000])
def test_a_file_without_samples_raises_an_error(tmp_path, rate):
    assert resample(np.zeros(0, "f"), rate).shape == (0,)
    with pytest.raises(ValueError, match=r"holds no samples: its chunk 'data' has 0 of 44 bytes"):
        load(tmp_path, riff(1, 16, b"", rate=rate))
    crashed = riff(1, 16, ENCODED[1, 16], size=0, rate=rate)
    with pytest.raises(ValueError, match=r"holds no samples: its chunk 'data' has 0 of 54 bytes. A recorder that was"):
        load(tmp_path, crashed)


def test_a_sound_must_be_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "zero.wav").symlink_to("/dev/zero")
    for path, kind in ((tmp_path / "pipe.wav", "FIFO"), (tmp_path / "zero.wav", "device"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=f"must be a regular file, got a {kind}"):
            load_wav(path)


def test_a_missing_file_raises_an_error(tmp_path):
    with pytest.raises(ValueError, match=re.escape("nowhere.wav cannot be read: No such file")):
        load_wav(tmp_path / "nowhere.wav")


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000, 15_999])
def test_a_tone_stays_the_same_tone_after_resampling(rate):
    seconds = 0.4
    hertz = 0.4 * min(rate, 16_000)
    sound = np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate).astype("f")
    resampled = resample(sound, rate)
    assert resampled.dtype == np.float32
    assert resampled.size == -(-sound.size * 16_000 // rate)
    expected = np.sin(2 * np.pi * hertz * np.arange(resampled.size) / 16_000)
    inner = slice(1600, -1600)  # at both ends the filter reaches into silence
    np.testing.assert_allclose(resampled[inner], expected[inner], rtol=0, atol=3e-4)


def test_frequencies_above_half_the_new_rate_are_removed():
    sound = np.sin(2 * np.pi * 8_050 * np.arange(24_000) / 48_000).astype("f")
    assert np.abs(resample(sound, 48_000)[1600:-1600]).max() < 3e-4


def test_sound_at_16_khz_is_returned_unchanged(tmp_path):
    np.testing.assert_array_equal(inspect.unwrap(resample)(SAMPLES.astype("f"), 16_000), SAMPLES.astype("f"))
    content = riff(1, 16, (SAMPLES * 2**15).astype("<i2").tobytes() * 800, rate=8_000)
    assert load(tmp_path, content).size == 8_000
