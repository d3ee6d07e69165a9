"""Stop strings: text is returned up to the first one, however it is cut, and never part of a stop string."""

import itertools
import random

import pytest

from specsamp_jax.text import StopStream


def text_before_stop(text, stops):
    """The text before the stop string that is complete first (the longest of those), and that stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_any_pieces_give_the_text_before_the_first_stop_string():
    rng = random.Random(0)
    num_stopped = 0
    for _ in range(3000):
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        expected, stop = text_before_stop(text, stops)
        cuts = [0, *sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 6))), len(text)]
        stream, written, seen = StopStream(stops), "", ""
        for begin, end in itertools.pairwise(cuts):
            written += stream.push(text[begin:end])
            seen += text[begin:end]
            assert expected.startswith(written)
            if stream.stopped is None:
                # Only text that could begin a stop string is held back.
                held = seen[len(written) :]
                assert not held or any(each.startswith(held) and each != held for each in stops)
        assert written + stream.flush() == expected
        assert stream.stopped == stop
        num_stopped += stop is not None
    assert 500 < num_stopped < 2500


def test_an_empty_stop_string_raises_an_error():
    with pytest.raises(ValueError, match=r"stops must hold texts of one character or more, got \['a', ''\]"):
        StopStream(["a", ""])
