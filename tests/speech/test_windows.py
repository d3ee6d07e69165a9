"""Starts and ends of windows of sound, and how the text of a window is cut at its timestamps."""

import dataclasses

import numpy as np
import pytest
from whisper_fixture import module, waveform

from specsamp_jax.models.whisper.features import log_mel
from specsamp_jax.speech.windows import FixedWindows, SlidingWindows, split

pytestmark = pytest.mark.optimised(False)

FIRST = 71


@pytest.mark.parametrize(
    ("tokens", "pieces", "advance"),
    [
        # A pair of timestamps ends a piece; sound after the last pair is transcribed again in the next window.
        ([71, 5, 80, 80, 6, 90, 90, 7], [(0, 18, [71, 5, 80]), (18, 38, [80, 6, 90])], 38),
        ([71, 5, 80, 85], [(0, 18, [71, 5, 80])], 18),
        # A single timestamp at the end: no speech follows in this window.
        ([71, 5, 80, 80, 6, 90], [(0, 18, [71, 5, 80]), (18, 38, [80, 6, 90])], 150),
        # No pair: the whole text is one piece, up to its last timestamp unless that is the first one.
        ([71, 5, 6, 90], [(0, 38, [71, 5, 6, 90])], 150),
        ([71, 5, 6], [(0, 150, [71, 5, 6])], 150),
        ([5, 6], [(0, 150, [5, 6])], 150),
        ([], [], 150),
        # A pair at time 0, which the rules forbid, must not make the windows stand still.
        ([71, 71], [(0, 0, [71])], 150),
    ],
)
def test_a_text_is_cut_at_its_timestamps(tokens, pieces, advance):
    found, frames = split(np.array(tokens, np.int32), 150, FIRST)
    assert [(piece.start, piece.end, piece.tokens.tolist()) for piece in found] == pieces
    assert frames == advance


def test_fixed_windows_have_features_of_their_own_sound_alone():
    config, sound = module("multilingual").config, waveform(4, 5.003)
    windows = FixedWindows(sound, config)
    assert windows.starts == [0, 200, 400]
    assert windows.num_frames == 501
    last = np.pad(sound[64_000:], (0, 32_000 - (sound.size - 64_000)))
    np.testing.assert_array_equal(windows.features(400), log_mel(last, 80))
    (piece,), following = windows.split(np.array([5, 6]), 400)
    assert (piece.start, piece.end, following) == (0, 101, None)
    assert FixedWindows(np.zeros(0, "f"), config).starts == []


def test_sliding_windows_have_parts_of_the_features_of_the_whole_sound():
    config, sound = module("multilingual").config, waveform(4, 5.003)
    windows = SlidingWindows(sound, config, FIRST)
    assert (windows.starts, windows.num_frames) == ([0], 500)
    features = log_mel(sound, 80)
    np.testing.assert_array_equal(windows.features(37), features[:, 37:237])
    last = windows.features(437)
    np.testing.assert_array_equal(last[:, :63], features[:, 437:])
    assert (last[:, 63:] == 0).all()
    assert windows.split(np.array([71, 5, 80, 80]), 37)[1] == 37 + 18
    assert windows.split(np.array([71, 5, 80]), 437)[1] is None
    assert windows.split(np.array([71, 5, 110, 110]), 437)[1] is None  # beyond the end of the sound


def test_the_config_sets_the_length_of_a_window():
    config = dataclasses.replace(module("multilingual").config, max_source_positions=30)
    assert FixedWindows(waveform(4, 1.3), config).starts == [0, 60, 120]
