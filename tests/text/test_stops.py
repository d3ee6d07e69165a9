"""Stop strings: the text up to the first one, whatever the pieces, and nothing that could begin one too early."""

import itertools
import random

import pytest

from specsamp_jax.text import StopStream


def text_before_stop(text, stops):
    """The text as it stands when its characters so far first end with a stop string, without that."""
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
                # No more is held back than could begin a stop string.
                held = seen[len(written) :]
                assert not held or any(each.startswith(held) and each != held for each in stops)
        assert written + stream.flush() == expected
        assert stream.stopped == stop
        num_stopped += stop is not None
    assert 500 < num_stopped < 2500


def test_a_stop_string_has_a_character():
    with pytest.raises(ValueError, match=r"stops must hold texts of one character or more, got \['a', ''\]"):
        StopStream(["a", ""])
