"""Output of `specsamp transcribe`: texts, subtitles or lines of JSON, on standard output or in a folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from specsamp_jax.speech import Segment, Transcript, Word, to_srt, to_vtt

FORMATS = ("text", "srt", "vtt", "json")


def check_output(output_format: str, files: Sequence[Path], folder: Path | None) -> None:
    """Raises UsageError if transcripts of the files cannot be written in the format, or overwrite each other."""
    if output_format in ("srt", "vtt") and len(files) > 1 and folder is None:
        raise click.UsageError(f"'--format {output_format}' of several files needs '--output-dir'.")
    if folder is None:
        return
    if folder.exists() and not folder.is_dir():
        raise click.UsageError(f"'--output-dir' must be a folder, and {folder} is a file.")
    seen: dict[str, Path] = {}
    for file in files:
        other = seen.setdefault(file.stem, file)
        if other is not file:
            raise click.UsageError(f"{other} and {file} have the same name in '--output-dir'.")


def write_transcripts(
    files: Sequence[Path],
    transcripts: Sequence[Transcript],
    *,
    output_format: str,
    with_times: bool,
    word_times: bool,
    folder: Path | None,
) -> None:
    """Writes each transcript to standard output, or to a file with the sound's name and the format's suffix.

    Args:
      files: The sounds.
      transcripts: One per sound.
      output_format: A name in `FORMATS`.
      with_times: Whether a text has one line per segment, with its times.
      word_times: Whether a text has one line per word instead, with its times, and JSON the words of each segment.
      folder: The folder, created if it is missing. None: standard output.
    """
    for file, transcript in zip(files, transcripts, strict=True):
        name = click.format_filename(file)  # the bytes of a file's name may be no text
        prefix = f"{name}: " if len(files) > 1 and folder is None and output_format == "text" else ""
        lines = "".join(
            prefix + line + "\n" for line in _lines(name, transcript, output_format, with_times, word_times)
        )
        if folder is None:
            click.echo(lines, nl=False)
            continue
        folder.mkdir(parents=True, exist_ok=True)
        suffix = "txt" if output_format == "text" else output_format
        (folder / f"{file.stem}.{suffix}").write_text(lines, encoding="utf-8")


def _lines(name: str, transcript: Transcript, output_format: str, with_times: bool, word_times: bool) -> list[str]:
    if output_format == "json":
        segments = [_values(segment, word_times) for segment in transcript.segments]
        values = {"file": name, "language": transcript.language, "text": transcript.text, "segments": segments}
        return [json.dumps(values, ensure_ascii=False)]
    if output_format in ("srt", "vtt"):
        write = to_srt if output_format == "srt" else to_vtt
        return write(transcript.segments).splitlines()
    if word_times:
        return [_line(word) for segment in transcript.segments for word in segment.words]
    return list(map(_line, transcript.segments)) if with_times else [transcript.text]


def _values(segment: Segment, word_times: bool) -> dict[str, Any]:
    values = {"start": segment.start, "end": segment.end, "text": segment.text}
    return {**values, "words": [word._asdict() for word in segment.words]} if word_times else values


def _line(span: Segment | Word) -> str:
    return f"[{span.start:.2f} - {span.end:.2f}] {span.text.strip()}"
