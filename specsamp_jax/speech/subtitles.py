"""Writes segments as subtitles: SubRip (.srt) and WebVTT (.vtt)."""

import html
from collections.abc import Callable, Iterator, Sequence

from specsamp_jax.speech.transcript import Segment


def to_srt(segments: Sequence[Segment]) -> str:
    """Returns the segments as SubRip: a number, times such as 00:01:02,345 --> 00:01:04,000 and a line of text each.

    Cues are in order and do not overlap: one that would reach into the next ends where that begins. Segments without
    text have no cue. A segment with words has a cue for each of them, in which the word is underlined: <u>hold.</u>

    Example:
      >>> from specsamp_jax.speech import Segment
      >>> print(to_srt([Segment(0.0, 2.5, "Please hold."), Segment(2.0, 3.0, "Thank you.")]))
      1
      00:00:00,000 --> 00:00:02,000
      Please hold.
      <BLANKLINE>
      2
      00:00:02,000 --> 00:00:03,000
      Thank you.
      <BLANKLINE>
    """
    cues = (
        f"{number}\n{_time(start, ',')} --> {_time(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(_cues(segments, str), start=1)
    )
    return "\n".join(cues)


def to_vtt(segments: Sequence[Segment]) -> str:
    """Returns the segments as WebVTT, with cues as in `to_srt`; the characters &, < and > of texts are escaped.

    Source: W3C, WebVTT: The Web Video Text Tracks Format, section 4.1.
    """
    cues = (
        f"{_time(start, '.')} --> {_time(end, '.')}\n{text}\n"
        for start, end, text in _cues(segments, lambda text: html.escape(text, quote=False))
    )
    return "\n".join(["WEBVTT\n", *cues])


def _cues(segments: Sequence[Segment], escape: Callable[[str], str]) -> Iterator[tuple[int, int, str]]:
    """Start and end in milliseconds and the text of each cue, in one line: an empty line would end the cue."""
    shown = [span for segment in segments if segment.text.strip() for span in _spans(segment, escape)]
    before = 0
    for i, (since, until, text) in enumerate(shown):
        start, end = max(_milliseconds(since), before), _milliseconds(until)
        if i + 1 < len(shown):
            following = _milliseconds(shown[i + 1][0])
            # Where the next one does not begin later, it is moved behind this one.
            end = min(end, following) if following > start else end
        before = max(end, start + 1)
        yield start, before, " ".join(text.split())


def _spans(segment: Segment, escape: Callable[[str], str]) -> Iterator[tuple[float, float, str]]:
    """Start, end and text of a segment, or of each word of it, which is shown until the next one."""
    if not segment.words:
        yield segment.start, segment.end, escape(segment.text)
    for i, word in enumerate(segment.words):
        before, after = ("".join(other.text for other in part) for part in (segment.words[:i], segment.words[i + 1 :]))
        space = word.text[: len(word.text) - len(word.text.lstrip())]
        end = max(word.end, segment.words[i + 1].start) if i + 1 < len(segment.words) else word.end
        yield word.start, end, f"{escape(before)}{space}<u>{escape(word.text.strip())}</u>{escape(after)}"


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _time(milliseconds: int, separator: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}{separator}{rest:03}"
