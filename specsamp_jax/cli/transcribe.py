"""`specsamp transcribe`: text to standard output, all else to standard error."""

import time
from pathlib import Path

import click
import jax
import numpy as np

from specsamp_jax._types import SamplingParams, Stats
from specsamp_jax.models.whisper.checkpoint import share_encoder
from specsamp_jax.models.whisper.features import SAMPLE_RATE
from specsamp_jax.speech import Segment, Speech, check_pair, load_speech, load_wav, transcribe

DTYPES = ["float32", "bfloat16", "float16"]
FOLDER = click.Path(path_type=Path)


@click.command("transcribe")
@click.argument("audio", nargs=-1, required=True, type=FOLDER)
@click.option("--target", required=True, type=FOLDER, help="A folder with a Whisper in Hugging Face's layout.")
@click.option(
    "--draft", type=FOLDER, help="One with a smaller Whisper of the same vocabulary; the target alone if none."
)
@click.option("--language", help="A code such as en. Detected unless given; English-only models take none.")
@click.option("--task", type=click.Choice(["transcribe", "translate"]), help="English-only models take none.")
@click.option("--timestamps", is_flag=True, help="One line a segment, with its times.")
@click.option("--num-draft", type=click.IntRange(1, 32), default=5, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows of 30 s at once.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Of a window; as many as it has room for unless given.")
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="To compute in.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of all the chance.")
def transcribe_command(
    audio: tuple[Path, ...],
    target: Path,
    draft: Path | None,
    language: str | None,
    task: str | None,
    timestamps: bool,
    num_draft: int,
    temperature: float,
    batch_size: int,
    max_new_tokens: int | None,
    dtype: str,
    seed: int,
) -> None:
    """Write down what is said in WAV files, several of them at once.

    The text goes to standard output, a line a file (or a segment), all else to standard error.
    """
    try:
        waveforms = [load_wav(path) for path in audio]
        models = _load(target, draft, dtype)
        began = time.perf_counter()
        result = transcribe(
            jax.random.key(seed),
            waveforms,
            target=models[0],
            draft=models[1],
            num_draft=num_draft,
            language=language,
            task=task,
            timestamps=timestamps,
            sampling=SamplingParams(temperature),
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            progress_fn=lambda heard, total: _say(f"heard {heard:.1f} of {total:.1f} s"),
        )
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    seconds = time.perf_counter() - began
    for path, transcript in zip(audio, result.transcripts, strict=True):
        if transcript.language is not None and language is None:
            _say(f"{path}: the language is {transcript.language}")
        name = f"{path}: " if len(audio) > 1 else ""
        for line in map(_line, transcript.segments) if timestamps else [transcript.text]:
            click.echo(name + line)
    _say(_summary(result.stats, sum(waveform.size for waveform in waveforms) / SAMPLE_RATE, seconds))


def _load(target: Path, draft: Path | None, dtype: str) -> tuple[Speech, Speech | None]:
    began = time.perf_counter()
    speech = load_speech(target, dtype=dtype)
    drafter = None if draft is None else load_speech(draft, dtype=dtype)
    shared = "there is no drafter: the target decodes alone"
    if drafter is not None:
        check_pair(speech, drafter)
        difference = share_encoder(speech.module, drafter.module)
        shared = "the drafter shares the target's encoder, for theirs are the same"
        if difference is not None:
            shared = f"the drafter has an encoder of its own, which runs too: {difference} differs"
    _say(f"loaded in {time.perf_counter() - began:.1f} s; {shared}")
    return speech, drafter


def _line(segment: Segment) -> str:
    return f"[{segment.start:.2f} - {segment.end:.2f}] {segment.text}"


def _summary(stats: Stats, length: float, seconds: float) -> str:
    num_emitted = int(np.sum(stats.num_emitted))
    parts = [f"{num_emitted} tokens of {length:.1f} s of sound in {seconds:.1f} s, compilation included"]
    if stats.num_drafted.size and int(stats.num_drafted[0]):
        # Each step of each window drafts one first token.
        parts.append(f"{num_emitted / int(stats.num_drafted[0]):.2f} tokens a step")
        rates = np.asarray(stats.num_accepted) / np.asarray(stats.num_drafted)
        parts.append("accepted by position: " + " ".join(f"{rate:.2f}" for rate in rates))
    return "; ".join(parts)


def _say(what: str) -> None:
    click.secho(what, err=True, dim=True)
