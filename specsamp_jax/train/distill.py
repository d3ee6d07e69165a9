"""Distillation from a folder and data to a folder: a drafter for a decoder from texts, for a Whisper from sounds."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax._files import read_json
from specsamp_jax.models import DecoderConfig, WhisperConfig, load_module
from specsamp_jax.models.decoder import Decoder
from specsamp_jax.models.whisper.settings import load_settings
from specsamp_jax.speech import language_code, load_speech
from specsamp_jax.speech.sound_files import SUFFIXES
from specsamp_jax.text import load_tokenizer
from specsamp_jax.train import data, drafters, speech
from specsamp_jax.train.folder import Report, check_out, save_drafter, save_speech_drafter, write_report
from specsamp_jax.train.loop import LossFn, Progress, ProgressFn, train
from specsamp_jax.train.losses import kl_divergence, random_windows, text_logits, total_variation

LOSSES = {"kl": kl_divergence, "tv": total_variation}
TRAINING = "training"
"""The folder of checkpoints within a drafter's."""

_MAX_HELD_OUT = 64  # batches of held-out text that are measured


@dataclasses.dataclass(frozen=True)
class Options:
    """Settings of a distillation.

    Attributes:
      num_steps: Steps. None: as many as `minutes` allow.
      minutes: Time for the steps, compilation and preparation excluded, if `num_steps` is None.
      batch_size: Rows of a step: windows of text or of sound.
      length: Tokens of a window of text; of a transcript, the most.
      learning_rate: Peak of the learning rate.
      weight_decay: Weight decay of AdamW.
      loss: "kl" or "tv": Kullback-Leibler divergence or total variation.
      held_out: Fraction of the data, chosen by hash, that is measured and not trained on.
      num_draft: Drafts per step, for the tokens per step in the report.
      seed: Of the weights and of the order of the data.
      dtype: Dtype of the computation. The trained weights are float32 until they are saved.
      save_seconds: Time between checkpoints.

    Raises:
      ValueError: A value out of its range.
    """

    num_steps: int | None = None
    minutes: float | None = None
    batch_size: int = 16
    length: int = 256
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    loss: str = "kl"
    held_out: float = 0.05
    num_draft: int = 5
    seed: int = 0
    dtype: DTypeLike = jnp.float32
    save_seconds: float = 60.0

    def __post_init__(self):
        if (self.num_steps is None) == (self.minutes is None):
            raise ValueError(f"num_steps or minutes must be given, and not both; got {self.num_steps}, {self.minutes}.")
        for name in ("num_steps", "minutes", "batch_size", "length", "learning_rate", "num_draft"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must be above 0 and below 1, got {self.held_out}.")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}.")


def distill_text(
    target: Path,
    sources: Sequence[Path],
    out: Path,
    *,
    options: Options,
    layers: Sequence[int] | None = None,
    config_fn: Callable[[DecoderConfig], DecoderConfig] | None = None,
    progress_fn: ProgressFn = lambda progress: None,
) -> Report:
    """Trains a drafter for the decoder in a folder on texts, and writes it into another folder.

    It is trained towards the target's distribution after each token of the texts. If `out` holds a checkpoint of the
    same training, that is continued, with the weights that an uninterrupted training has.

    Args:
      target: The folder of the target.
      sources: Text files, or folders with .txt and .md files.
      out: The folder of the drafter: weights, config and tokenizer, report.json, and `training` with the checkpoint.
      options: See `Options`.
      layers: The target's layers that the drafter begins with; it then has the target's width.
      config_fn: Returns the drafter's config from the target's, such as a `smaller_config`; random weights at first.
        Neither: a quarter of the target's layers.
      progress_fn: See `ProgressFn`.

    Raises:
      ValueError: Wrong folders, files or options, or a checkpoint of another training in `out`.
    """
    began = time.perf_counter()
    check_out(target, out)
    files = data.find_files(sources, data.TEXTS)
    tokenizer = load_tokenizer(target)
    texts = data.read_texts(files, tokenizer, options.held_out, options.length + 1)
    module = load_module(target, dtype=options.dtype)
    if not isinstance(module, Decoder):
        raise ValueError(f"{target} must hold a decoder of text, got a {type(module).__name__}; see distill_speech.")
    largest, vocab_size = max(texts.train.max(), texts.held_out.max()), module.config.vocab_size
    if largest >= vocab_size:
        raise ValueError(
            f"The tokenizer does not fit the target: it gave token {largest}, and the target has {vocab_size}."
        )
    if layers is not None and config_fn is not None:
        raise ValueError("layers or config_fn must be given, and not both.")
    if config_fn is not None:
        draft = drafters.new_drafter(module, config_fn(module.config), options.seed, options.dtype)
    else:
        num_layers = module.config.num_hidden_layers
        draft = drafters.layers_of(module, layers or drafters.spread_layers(num_layers, -(-num_layers // 4)))

    target_graph, frozen = nnx.split(module)
    draft_graph, params = nnx.split(draft)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def logits_fn(params, frozen, tokens):
        p = jax.lax.stop_gradient(text_logits(target_graph, frozen, tokens))
        return p, text_logits(draft_graph, params, tokens), jnp.ones(tokens.shape, bool)

    def loss_fn(params, frozen, tokens):
        p, q, _ = logits_fn(params, frozen, tokens)
        return LOSSES[options.loss](p, q).mean()

    stream, key = jnp.asarray(texts.train), jax.random.key(options.seed)

    def batch_fn(step):
        key_of_step = jax.random.fold_in(key, step)
        return random_windows(key_of_step, stream, batch_size=options.batch_size, length=options.length)

    params, num_steps = _train(loss_fn, params, frozen, batch_fn, target, files, out, options, draft, progress_fn)
    rows = texts.held_out[: len(texts.held_out) // options.length * options.length].reshape(-1, options.length)
    size = min(options.batch_size, len(rows))
    held_out = [jnp.asarray(rows[i : i + size]) for i in range(0, len(rows) - size + 1, size)][:_MAX_HELD_OUT]
    nnx.update(draft, params)
    save_drafter(out, draft, target)
    sums = _measure(speech.agreement_of(logits_fn), params, frozen, held_out, progress_fn)
    return write_report(out, sums, num_steps, draft, options.num_draft, began)


def distill_speech(
    target: Path,
    sources: Sequence[Path],
    out: Path,
    *,
    options: Options,
    layers: Sequence[int] | None = None,
    language: str = "en",
    progress_fn: ProgressFn = lambda progress: None,
) -> Report:
    """Trains a drafter for the Whisper in a folder on sounds, and writes it into another folder.

    The drafter has the target's encoder, embeddings and last norm, and some of its decoder's layers, which are trained
    towards the target's distribution along the target's own greedy transcripts; others are not needed. Resumes as
    `distill_text` does.

    Args:
      target: The folder of the target.
      sources: WAV, FLAC, Ogg or MP3 files, or folders of them; see `load_audio`.
      out: The folder of the drafter, as in `distill_text`.
      options: See `Options`. All states of the encoder stay in memory: 3 MB per 30 s for the base model in float32.
      layers: The layers of the target's decoder that the drafter begins with. None: the first and the last.
      language: The language that is spoken: a code or an English name.
      progress_fn: See `ProgressFn`.

    Raises:
      ValueError: Wrong folders, files or options, or a checkpoint of another training in `out`.
    """
    began = time.perf_counter()
    check_out(target, out)
    files = data.find_files(sources, SUFFIXES)
    language = _code(target, language)
    model = load_speech(target, dtype=options.dtype)
    windows = []
    for i, file in enumerate(files):
        windows += data.read_windows([file], model.module.config, options.held_out)
        progress_fn(Progress("reading", i + 1, len(files)))
    aside = np.array([window.held_out for window in windows])
    if aside.all() or not aside.any():
        raise ValueError(
            f"The sounds must have windows to train on and windows held out, got {(~aside).sum()} and {aside.sum()} "
            f"with held_out = {options.held_out}: more files are needed, or another fraction."
        )
    longest = model.settings.max_length - model.settings.prompt_length(timestamps=False)
    labelled = speech.label(
        model,
        [window.features for window in windows],
        language=language,
        max_new_tokens=min(options.length, longest),
        batch_size=min(options.batch_size, len(windows)),
        progress_fn=progress_fn,
    )
    draft, params, num_steps, sums = distill_windows(
        model.module,
        labelled.select(np.flatnonzero(~aside)),
        labelled.select(np.flatnonzero(aside)),
        options=options,
        layers=layers,
        folder=out / TRAINING,
        settings={**_described(target, files, options), "language": language},
        progress_fn=progress_fn,
    )
    save_speech_drafter(target, draft.config.decoder_layers, params, out)
    return write_report(out, sums, num_steps, draft.decoder, options.num_draft, began)


def distill_windows(
    target: Any,
    train_data: speech.SpeechData,
    held_out: speech.SpeechData,
    *,
    options: Options,
    layers: Sequence[int] | None,
    folder: Path,
    settings: Mapping[str, Any],
    progress_fn: ProgressFn,
) -> tuple[Any, Any, int, np.ndarray]:
    """Trains a drafter's decoder on labelled windows.

    Args:
      target: The target's module.
      train_data: Windows to train on.
      held_out: Windows to measure on.
      options: See `Options`.
      layers: See `distill_speech`.
      folder: The folder of checkpoints.
      settings: Values that decide the result, for the check of a checkpoint.
      progress_fn: See `ProgressFn`.

    Returns:
      The drafter, its trained blocks in float32, the number of steps, and the sums of `agreement_of`.
    """
    num_layers = target.config.decoder_layers
    draft = drafters.layers_of(target, layers or drafters.spread_layers(num_layers, min(2, num_layers)))
    decoders = speech.take_apart(target, draft, train_data.num_prompt)
    params, num_steps = train(
        speech.loss_of(decoders, LOSSES[options.loss]),
        decoders.params,
        decoders.frozen,
        speech.batches(train_data, options.batch_size, options.seed),
        folder=folder,
        settings={**settings, "layers": list(layers or ()), "num_windows": len(train_data.tokens)},
        num_steps=options.num_steps,
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        save_seconds=options.save_seconds,
        progress_fn=progress_fn,
    )
    held_out_batches = list(speech.in_order(held_out, min(options.batch_size, len(held_out.tokens))))
    agreement = speech.agreement_of(decoders.logits_fn)
    sums = _measure(agreement, params, decoders.frozen, held_out_batches, progress_fn)
    nnx.update(draft.decoder, jax.tree.map(lambda x: x.astype(options.dtype), params))
    return draft, params, num_steps, sums


def _train(
    loss_fn: LossFn, params, frozen, batch_fn, target, files, out, options: Options, draft, progress_fn
) -> tuple[Any, int]:
    settings = {**_described(target, files, options), "config": draft.config.to_dict()}
    return train(
        loss_fn,
        params,
        frozen,
        batch_fn,
        folder=out / TRAINING,
        settings=settings,
        num_steps=options.num_steps,
        minutes=options.minutes,
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        save_seconds=options.save_seconds,
        progress_fn=progress_fn,
    )


def _code(target: Path, language: str) -> str:
    """The code of a language; raises ValueError if the Whisper in a folder does not have it. No weights are read."""
    settings = load_settings(target, WhisperConfig.from_dict(read_json(target / "config.json")))
    return language_code(language, list(dict(settings.languages)))


def _described(target: Path, files: Sequence[Path], options: Options) -> dict[str, Any]:
    """The values that decide the weights, apart from those of the optimizer."""
    weights = data.digest(sorted(target.glob("*.safetensors")))
    names = ("batch_size", "length", "loss", "held_out", "seed")
    chosen = {name: getattr(options, name) for name in names}
    return {"target": weights, "data": data.digest(files), **chosen, "dtype": jnp.dtype(options.dtype).name}


def _measure(agreement, params, frozen, batches: Iterable[Any], progress_fn: ProgressFn) -> np.ndarray:
    batches = list(batches)
    sums = np.zeros(3)
    for i, batch in enumerate(batches):
        sums += np.asarray(agreement(params, frozen, batch), np.float64)
        progress_fn(Progress("measuring", i + 1, len(batches)))
    return sums
