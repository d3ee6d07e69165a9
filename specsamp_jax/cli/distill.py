"""`specsamp distill`: trains a drafter for a target, and writes its folder."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import jax.numpy as jnp

from specsamp_jax import train
from specsamp_jax._files import check_folder, read_json
from specsamp_jax.cli.cache import cache_option
from specsamp_jax.cli.folders import find_option
from specsamp_jax.cli.shared import FOLDER, FiniteRange, say, seed_option, talks, verbosity_options
from specsamp_jax.models import DecoderConfig
from specsamp_jax.models.decoder import Decoder
from specsamp_jax.train.distill import LOSSES, TRAINING
from specsamp_jax.train.drafters import config_of_ratio, smaller_config, spread_layers
from specsamp_jax.train.loop import STATE

_DTYPES = ("float32", "bfloat16")


class Layers(click.ParamType):
    """Indices of layers: whole numbers with commas between them."""

    name = "indices"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Returns the indices."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} must be layers such as 0,5.", param, ctx)


@click.command("distill")
@click.argument("data", nargs=-1, required=True, type=FOLDER)
@click.option("--target", required=True, type=FOLDER, help="A decoder of text or a Whisper: folder, or id on the hub.")
@click.option("--out", required=True, type=FOLDER, help="Folder of the drafter; a training in it is continued.")
@click.option("--layers", type=click.IntRange(1), help="Layers of the drafter. Default: a quarter; of a Whisper, 2.")
@click.option("--from-layers", type=Layers(), help="Layers of the target to begin with, such as 0,5.")
@click.option("--hidden-size", type=click.IntRange(1), help="Width of a drafter with random weights. Decoders only.")
@click.option(
    "--ratio",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Its parameters as a share of the target's, instead of --hidden-size.",
)
@click.option("--loss", type=click.Choice(list(LOSSES)), default="kl", show_default=True, help="Divergence to lower.")
@click.option("--steps", type=click.IntRange(1), help="Steps of the training. Default: 1000.")
@click.option("--minutes", type=FiniteRange(0, min_open=True), help="Time for the steps, instead of their number.")
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Windows per step.")
@click.option("--length", type=click.IntRange(2), default=256, show_default=True, help="Tokens per window.")
@click.option(
    "--learning-rate", type=FiniteRange(0, min_open=True), default=3e-4, show_default=True, help="Peak of the rate."
)
@click.option(
    "--held-out",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=0.05,
    show_default=True,
    help="Fraction of the data to measure on, not to train on.",
)
@click.option("--num-draft", type=click.IntRange(1, 32), default=5, show_default=True, help="Drafts, for the report.")
@click.option("--language", default="en", show_default=True, help="Code or name of what is spoken. Whisper only.")
@click.option(
    "--dtype", type=click.Choice(_DTYPES), default=_DTYPES[0], show_default=True, help="Dtype of the computation."
)
@seed_option
@cache_option
@verbosity_options
def distill_command(
    data: tuple[Path, ...],
    target: Path,
    out: Path,
    layers: int | None,
    from_layers: tuple[int, ...] | None,
    hidden_size: int | None,
    ratio: float | None,
    loss: str,
    steps: int | None,
    minutes: float | None,
    batch_size: int,
    length: int,
    learning_rate: float,
    held_out: float,
    num_draft: int,
    language: str,
    dtype: str,
    seed: int,
) -> None:
    """Train a drafter for your target on your data.

    DATA are text files (or folders with .txt and .md files) for a decoder, and sound files (or folders) for a Whisper,
    as `specsamp transcribe` reads them; no transcripts are needed, because the target's own are used. `--draft OUT` of
    the other commands loads the result.
    """
    target = find_option("--target", target)
    check_folder(target, "--target")  # a GGUF file has no files to copy for the drafter
    if steps is not None and minutes is not None:
        raise ValueError("--steps or --minutes must be given, and not both.")
    options = train.Options(
        num_steps=1000 if steps is None and minutes is None else steps,
        minutes=minutes,
        batch_size=batch_size,
        length=length,
        learning_rate=learning_rate,
        loss=loss,
        held_out=held_out,
        num_draft=num_draft,
        seed=seed,
        dtype=jnp.dtype(dtype),
    )
    config = read_json(target / "config.json")
    with _told_how_to_continue(out), _Bars() as bars:
        if config.get("model_type") == "whisper":
            for name, value in (("--hidden-size", hidden_size), ("--ratio", ratio)):
                if value is not None:
                    raise ValueError(f"{name} must be left out for a Whisper, whose drafter has the target's width.")
            chosen = _chosen_layers(from_layers, layers, config.get("decoder_layers"))
            report = train.distill_speech(
                target, data, out, options=options, layers=chosen, language=language, progress_fn=bars
            )
        else:
            config_fn = _config_fn(layers, hidden_size, ratio, from_layers)
            chosen = None if config_fn else _chosen_layers(from_layers, layers, config.get("num_hidden_layers"))
            report = train.distill_text(
                target, data, out, options=options, layers=chosen, config_fn=config_fn, progress_fn=bars
            )
    click.echo(
        f"{out}: {report.num_parameters / 1e6:.2f} million parameters trained or copied, {report.num_steps} steps; on "
        f"{report.num_positions} held-out positions the target accepts {report.acceptance_rate:.3f} of the drafts at "
        f"temperature 1 and {report.greedy_acceptance_rate:.3f} at 0, which makes {report.tokens_per_step:.2f} and "
        f"{report.greedy_tokens_per_step:.2f} tokens per step with {num_draft} drafts"
    )
    say(f"done in {report.seconds:.1f} s; the checkpoint in {out / 'training'} is no longer needed")


def _chosen_layers(
    from_layers: tuple[int, ...] | None, num_chosen: int | None, num_layers: int | None
) -> tuple[int, ...] | None:
    if from_layers is not None and num_chosen is not None:
        raise ValueError("--layers or --from-layers must be given, and not both.")
    if num_chosen is None or num_layers is None:
        return from_layers
    return spread_layers(num_layers, num_chosen)


def _config_fn(
    layers: int | None, hidden_size: int | None, ratio: float | None, from_layers: tuple[int, ...] | None
) -> Callable[[DecoderConfig], DecoderConfig] | None:
    if hidden_size is None and ratio is None:
        return None
    if from_layers is not None:
        raise ValueError("--from-layers must be left out with --hidden-size or --ratio: those weights are random.")
    if ratio is None:
        assert hidden_size is not None
        return lambda config: smaller_config(config, hidden_size, layers)
    if hidden_size is not None or layers is not None:
        raise ValueError("--ratio must be given without --hidden-size and --layers, which it decides.")
    return lambda config: config_of_ratio(Decoder, config, ratio)


@contextlib.contextmanager
def _told_how_to_continue(out: Path) -> Iterator[None]:
    """Says, after Ctrl-C, what becomes of the training."""
    try:
        yield
    except KeyboardInterrupt:
        if (out / TRAINING / STATE).exists():
            say(f"interrupted; the same command continues from the checkpoint in {out / TRAINING}")
        raise


class _Bars:
    """Progress bars, one per task, with the time left; none if no messages are written."""

    def __init__(self):
        self._task, self._bar, self._done, self._loss = "", None, 0, None

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, progress: train.Progress) -> None:
        if not talks():
            return
        if progress.task != self._task or self._bar is None:
            self._close()
            self._task, self._done = progress.task, 0
            self._bar = click.progressbar(
                length=progress.num_total,
                label=progress.task,
                file=sys.stderr,
                item_show_func=lambda loss: None if loss is None else f"loss {loss:.4f}",
            )
            self._bar.__enter__()
        self._bar.update(progress.num_done - self._done, progress.loss)
        self._done = progress.num_done

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
