"""Cues of subtitles, and the codes of languages."""

import re

import pytest

from specsamp_jax.speech import Segment, Word, language_code, to_srt, to_vtt


def test_cues_are_numbered_in_order_and_do_not_overlap():
    segments = [
        Segment(1.0, 3.5, "first"),
        Segment(3.0, 3.0, " "),  # no text, no cue
        Segment(3.2, 4.0, "reached into by the first"),
        Segment(3.2, 5.0, "begins with the one before"),
        Segment(3599.9996, 36_000.5, "an\n\nhour"),
        Segment(400_000.0, 400_000.0, "no time"),
    ]
    times = re.findall(r"(\S+) --> (\S+)", to_srt(segments))
    assert times == [
        ("00:00:01,000", "00:00:03,200"),
        ("00:00:03,200", "00:00:04,000"),
        ("00:00:04,000", "00:00:05,000"),
        ("01:00:00,000", "10:00:00,500"),
        ("111:06:40,000", "111:06:40,001"),
    ]
    assert re.findall(r"^\d+$", to_srt(segments), re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert "\nan hour\n" in to_srt(segments)
    assert to_srt([]) == ""


def test_a_web_track_has_a_header_points_and_escaped_text():
    assert to_vtt([Segment(0.5, 1.0, "a < b --> c & d")]) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.000\na &lt; b --&gt; c &amp; d\n"
    )
    assert to_vtt([]) == "WEBVTT\n"


def test_words_are_underlined_in_turn_until_the_next_one_begins():
    words = (Word(0.5, 0.8, " a"), Word(1.0, 1.5, " <b>"))
    spoken = [Segment(0.0, 2.0, "a <b>", words), Segment(2.0, 3.0, "c")]
    assert to_vtt(spoken) == (
        "WEBVTT\n\n00:00:00.500 --> 00:00:01.000\n<u>a</u> &lt;b&gt;\n"
        "\n00:00:01.000 --> 00:00:01.500\na <u>&lt;b&gt;</u>\n\n00:00:02.000 --> 00:00:03.000\nc\n"
    )


CODES = ["de", "en", "zh", "my", "haw", "ht"]


@pytest.mark.parametrize(
    ("language", "code"),
    [
        *[("en", "en"), ("EN", "en"), ("English", "en"), ("en-US", "en"), ("zh_TW", "zh"), ("Burmese", "my")],
        *[(" german ", "de"), ("haw", "haw"), ("Haitian Creole", "ht"), ("mandarin", "zh")],
    ],
)
def test_codes_and_names_of_languages(language, code):
    assert language_code(language, CODES) == code


@pytest.mark.parametrize(
    ("language", "sentence"),
    [
        ("germn", "one of de, en, zh, my, haw, ht, got 'germn'. Did you mean 'german'?"),
        ("french", "one of de, en, zh, my, haw, ht, got 'french'."),
        ("", "one of de, en, zh, my, haw, ht, got ''."),
    ],
)
def test_an_unknown_language_raises_an_error(language, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        language_code(language, CODES)
    assert language_code(language, []) == language  # an English-only model complains of any
