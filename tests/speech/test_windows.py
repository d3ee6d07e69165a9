"""Begin and end of windows, and the cuts of their texts."""

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
        # Pairs end pieces; what stands behind the last one is heard again.
        ([71, 5, 80, 80, 6, 90, 90, 7], [(0, 18, [71, 5, 80]), (18, 38, [80, 6, 90])], 38),
        ([71, 5, 80, 85], [(0, 18, [71, 5, 80])], 18),
        # One timestamp alone at the end: nothing follows in this window.
        ([71, 5, 80, 80, 6, 90], [(0, 18, [71, 5, 80]), (18, 38, [80, 6, 90])], 150),
        # No pair: the whole text is one piece, up to its last timestamp if that says anything.
        ([71, 5, 6, 90], [(0, 38, [71, 5, 6, 90])], 150),
        ([71, 5, 6], [(0, 150, [71, 5, 6])], 150),
        ([5, 6], [(0, 150, [5, 6])], 150),
        ([], [], 150),
        # What the rules forbid must not be heard for ever.
        ([71, 71], [(0, 0, [71])], 150),
    ],
)
def test_where_a_text_is_cut(tokens, pieces, advance):
    found, frames = split(np.array(tokens, np.int32), 150, FIRST)
    assert [(piece.start, piece.end, piece.tokens.tolist()) for piece in found] == pieces
    assert frames == advance


def test_fixed_windows_are_each_their_own_sound():
    config, sound = module("multilingual").config, waveform(4, 5.003)
    windows = FixedWindows(sound, config)
    assert windows.starts == [0, 200, 400]
    assert windows.num_frames == 501
    last = np.pad(sound[64_000:], (0, 32_000 - (sound.size - 64_000)))
    np.testing.assert_array_equal(windows.features(400), log_mel(last, 80))
    (piece,), following = windows.split(np.array([5, 6]), 400)
    assert (piece.start, piece.end, following) == (0, 101, None)
    assert FixedWindows(np.zeros(0, "f"), config).starts == []


def test_sliding_windows_are_parts_of_one_sound():
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


def test_a_window_is_what_the_config_says():
    config = dataclasses.replace(module("multilingual").config, max_source_positions=30)
    assert FixedWindows(waveform(4, 1.3), config).starts == [0, 60, 120]
