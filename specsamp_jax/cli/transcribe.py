"""`specsamp transcribe`: writes text to standard output, and messages to standard error."""

import time
from collections.abc import Sequence
from pathlib import Path

import click
import jax
import numpy as np

from specsamp_jax._files import read_json
from specsamp_jax._types import SamplingParams, Stats
from specsamp_jax.cli.cache import cache_option
from specsamp_jax.cli.folders import NGRAM, check_kind, draft_folder, find_option, loading
from specsamp_jax.cli.shared import (
    DTYPES,
    FOLDER,
    acceptance_line,
    check_target,
    say,
    seed_option,
    verbosity_options,
    warn_about_draft,
)
from specsamp_jax.cli.thresholds import sampling_options
from specsamp_jax.cli.transcripts import FORMATS, check_output, write_transcripts
from specsamp_jax.cli.verification import make_rule, rule_options, warn_about_rule
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter
from specsamp_jax.models.whisper.checkpoint import share_encoder
from specsamp_jax.models.whisper.features import SAMPLE_RATE
from specsamp_jax.models.whisper.model import WhisperConfig
from specsamp_jax.models.whisper.settings import load_settings
from specsamp_jax.speech import Fallback, Speech, check_pair, language_code, load_audio, load_speech, transcribe
from specsamp_jax.speech.sound_files import find_sounds


@click.command("transcribe")
@click.argument("audio", nargs=-1, required=True, type=FOLDER)
@click.option("--target", required=True, type=FOLDER, help="Folder of a Whisper, or its id on the Hugging Face hub.")
@click.option("--draft", help="A smaller Whisper with the same vocabulary, or 'ngram'. Default: no drafter.")
@click.option("--language", help="A code or name: en, en-US, English. Default: detected. Not for English-only models.")
@click.option("--task", type=click.Choice(["transcribe", "translate"]), help="Not for English-only models.")
@click.option("--timestamps", is_flag=True, help="Write one line per segment, with its times, for short sounds, too.")
@click.option(
    "--word-timestamps",
    is_flag=True,
    help="Times of each word, too: a line per word, or what the format has for words.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(FORMATS),
    default=FORMATS[0],
    show_default=True,
    help="Text, subtitles, or a line of JSON per file with the times of segments.",
)
@click.option("--output-dir", type=FOLDER, help="Folder for a file per sound. Default: standard output.")
@click.option(
    "--num-draft", type=click.IntRange(0, 32), default=5, show_default=True, help="Drafts per step; 0: no drafter."
)
@sampling_options
@rule_options
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows of 30 s at once.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Most tokens per window. Default: the model's limit.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Dtype of the computation."
)
@seed_option
@cache_option
@verbosity_options
def transcribe_command(
    audio: tuple[Path, ...],
    target: Path,
    draft: str | None,
    language: str | None,
    task: str | None,
    timestamps: bool,
    word_timestamps: bool,
    output_format: str,
    output_dir: Path | None,
    num_draft: int,
    temperatures: tuple[float, ...],
    compression_ratio_threshold: float | None,
    logprob_threshold: float | None,
    no_speech_threshold: float | None,
    rule: str,
    alpha: float | None,
    beta: float | None,
    batch_size: int,
    max_new_tokens: int | None,
    dtype: str,
    seed: int,
) -> None:
    """Transcribe sound files, or all in a folder.

    Several are decoded at once. WAV is read without further packages; FLAC, Ogg and MP3 need the extra specsamp[audio].
    The text is written to standard output, one line per file or segment, and messages to standard error.
    """
    drafts = num_draft > 0 and draft is not None
    verify_fn = make_rule(rule, has_drafter=drafts, alpha=alpha, beta=beta)
    files = _expand(audio)
    check_output(output_format, files, output_dir)
    target = find_option("--target", target)
    with_times = timestamps or word_timestamps or output_format != "text"
    language = _check_request(target, language, task, with_times, word_timestamps)
    waveforms = [load_audio(path) for path in files]
    models = _load(target, draft if num_draft else None, dtype)
    began = time.perf_counter()
    result = transcribe(
        jax.random.key(seed),
        waveforms,
        target=models[0],
        draft=models[1],
        num_draft=num_draft,
        language=language,
        task=task,
        timestamps="word" if word_timestamps else "always" if with_times else "auto",
        sampling=SamplingParams(temperatures[0]),
        fallback=Fallback(temperatures[1:], compression_ratio_threshold, logprob_threshold, no_speech_threshold),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        verify_fn=verify_fn,
        progress_fn=lambda done, total: say(_progress(done, total, time.perf_counter() - began)),
    )
    seconds = time.perf_counter() - began
    check_target(result.stats, "file")
    warn_about_draft(result.stats)
    for path, transcript in zip(files, result.transcripts, strict=True):
        if transcript.language is not None and language is None:
            say(f"{click.format_filename(path)}: the language is {transcript.language}")
    write_transcripts(
        files,
        result.transcripts,
        output_format=output_format,
        with_times=with_times,
        word_times=word_timestamps,
        folder=output_dir,
    )
    length = sum(waveform.size for waveform in waveforms) / SAMPLE_RATE
    say(_summary(result.stats, length, seconds, models[1]))
    if result.num_silent or result.num_again:
        say(f"windows without speech: {result.num_silent}; decoded again at a higher temperature: {result.num_again}")
    warn_about_rule(rule, result.verify_states, is_greedy=temperatures[0] == 0 and not result.num_again)


def _expand(paths: Sequence[Path]) -> list[Path]:
    """Replaces each folder by its sound files, and says how many they are."""
    files = find_sounds(paths)
    for folder in filter(Path.is_dir, paths):
        inside = sum(file.parent == folder for file in files)
        say(f"{click.format_filename(folder)}: {inside} sound files of {len(list(folder.iterdir()))} entries")
    return files


def _progress(done: float, total: float, spent: float) -> str:
    """The seconds of sound that are done, and the seconds of work that the others take at the same speed."""
    left = f", about {spent / done * (total - done):.0f} s left" if 0 < done < total else ""
    return f"{done:.1f} of {total:.1f} s done{left}"


def _check_request(
    target: Path, language: str | None, task: str | None, timestamps: bool, word_timestamps: bool
) -> str | None:
    """Returns the code of the language, after a check of what the target supports, before anything large is read."""
    check_kind("--target", target, speech=True)
    config = WhisperConfig.from_dict(read_json(target / "config.json"))
    settings = load_settings(target, config)
    code = None if language is None else language_code(language, list(dict(settings.languages)))
    settings.check(language=code, task=task, timestamps=timestamps)
    if word_timestamps:
        settings.heads(config)
    return code


def _load(target: Path, draft: str | None, dtype: str) -> tuple[Speech, Speech | Drafter | None]:
    began = time.perf_counter()
    folder = draft_folder(draft)
    check_kind("--target", target, speech=True)
    check_kind("--draft", folder, speech=True)
    with loading(target) as progress_fn:
        speech = load_speech(target, dtype=dtype, progress_fn=progress_fn)
    drafter = NGramDrafter() if draft == NGRAM else None
    if folder is not None:
        with loading(folder) as progress_fn:
            drafter = load_speech(folder, dtype=dtype, progress_fn=progress_fn)
    shared = "there is no drafter: the target decodes alone" if drafter is None else "drafts are n-grams of the text"
    if isinstance(drafter, Speech):
        check_pair(speech, drafter)
        difference = share_encoder(speech.module, drafter.module)
        shared = "the drafter uses the target's encoder, because theirs are equal"
        if difference is not None:
            shared = f"the drafter's own encoder runs, too, because it is another: {difference} differs"
    say(f"loaded in {time.perf_counter() - began:.1f} s; {shared}")
    return speech, drafter


def _summary(stats: Stats, length: float, seconds: float, draft: Speech | Drafter | None) -> str:
    num_emitted = int(np.sum(stats.num_emitted))
    parts = [f"{num_emitted} tokens from {length:.1f} s of sound in {seconds:.1f} s, compilation included"]
    acceptance = acceptance_line(stats)
    if acceptance is not None:
        # Each step of each window drafts one first token, except with n-grams, which may be new.
        steps = int(stats.num_drafted[0])
        parts += [f"{num_emitted / steps:.2f} tokens per step"] if isinstance(draft, Speech) else []
        parts.append(acceptance)
    return "; ".join(parts)
