"""Loads the models and the tokenizer of `specsamp generate`."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from specsamp_jax._files import brief, read_setting, whole_number
from specsamp_jax._gguf import is_gguf, read_gguf
from specsamp_jax._types import Model
from specsamp_jax.cli.folders import NGRAM, check_kind, draft_folder, find_option, loading
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.decoding.drafters import Drafter, NGramDrafter
from specsamp_jax.models import (
    GenerationConfig,
    load_generation_config,
    vocab_size,
    with_vocab_size,
)
from specsamp_jax.models.checkpoints.folder import Checkpoint, TouchedMemory, begin_all, open_checkpoint
from specsamp_jax.text import CheckpointTokenizer, check_vocabularies, load_tokenizer


class Setup(NamedTuple):
    """Models, tokenizer and settings of a generation.

    Attributes:
      target: The target.
      draft: The drafter, if there is one.
      tokenizer: The tokenizer of both.
      config: The settings in the target's folder; its end tokens are the tokenizer's if the folder states none.
      max_length: The longest text that the target was trained on, if its config.json states it.
      num_heads: The attention heads of each model.
      notes: Messages about the models, in sentences.
      checkpoints: The files of the target, and of the drafter if it is a model.
    """

    target: Model
    draft: Model | Drafter | None
    tokenizer: CheckpointTokenizer
    config: GenerationConfig
    max_length: int | None
    num_heads: tuple[int, ...]
    notes: list[str]
    checkpoints: tuple[Checkpoint, ...]


def open_models(
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    *,
    dtype: str | None = None,
    ignore: Collection[str] = (),
) -> Setup:
    """Returns the models `target` and `draft` with shapes in place of weights, and their tokenizer.

    Each of the three may be a checkpoint's folder, a GGUF file, or the id of a model of the Hugging Face hub.

    Args:
      target: The target. None: the trained pair that comes with the package.
      draft: The drafter, `NGRAM`, or None for the target alone (with the trained pair: its drafter).
      tokenizer: The tokenizer of both. None: the target's.
      dtype: The dtype of the computation. None: the dtype of the files; with the trained pair, float32.
      ignore: Settings of the target's generation_config.json to leave out.

    Raises:
      ValueError: A folder is missing or broken, or the two models do not share a vocabulary.
    """
    if target is None:
        target, tokenizer = ASSETS / "target", ASSETS
        draft, dtype = draft or str(ASSETS / "drafter"), dtype or "float32"
    target = find_option("--target", target)
    tokenizer = target if tokenizer is None else find_option("--tokenizer", tokenizer)
    drafter_folder = draft_folder(draft)
    check_kind("--target", target, speech=False)
    check_kind("--draft", drafter_folder, speech=False)
    notes = []
    # Small files are read first, so that mistakes are found before gigabytes are read.
    text = load_tokenizer(tokenizer)
    config = load_generation_config(target, ignore=ignore)
    if is_gguf(target) and (advice := _sampling_advice(target)):
        notes.append(f"{target} recommends {advice}, which is not applied: give the options that you want")
    if not config.eos_token and text.eos_token is not None:
        config = config._replace(eos_token=(text.eos_token,))
    if drafter_folder is not None and tokenizer == target:
        if is_gguf(drafter_folder) or (drafter_folder / "tokenizer.json").exists():
            check_vocabularies(text.tokenizer, load_tokenizer(drafter_folder).tokenizer)
        else:
            notes.append(f"{drafter_folder} has no tokenizer.json: its tokens are assumed to be the target's")
    folders = [folder for folder in (target, drafter_folder) if folder is not None]
    checkpoints = tuple(open_checkpoint(folder, dtype=dtype, rows_in_file=True) for folder in folders)
    models = [checkpoint.shapes() for checkpoint in checkpoints]
    kind = whole_number(1)
    max_length = read_setting(checkpoints[0].config, "max_position_embeddings", kind, source=target)
    num_heads = tuple(checkpoint.module.config.num_attention_heads for checkpoint in checkpoints)
    if drafter_folder is not None:
        size, drafter_size = map(vocab_size, models)
        if drafter_size != size:
            notes.append(f"the target has {size} logits and the draft {drafter_size}: the draft's are made to fit")
    elif draft is None:
        notes.append("there is no drafter: the target decodes alone")
    drafter = NGramDrafter() if draft == NGRAM else None
    setup = Setup(models[0], drafter, text, config, max_length, num_heads, notes, checkpoints)
    return _with_models(setup, models)


def begin_weights(setup: Setup, memory: TouchedMemory | None = None) -> Setup:
    """Returns the setup while a thread copies up to half of its weights; see `begin_all`."""
    return setup._replace(checkpoints=tuple(begin_all(setup.checkpoints, memory)))


def read_weights(setup: Setup) -> Setup:
    """Returns the setup of `open_models` with weights in its models.

    Raises:
      ValueError: A file is broken.
    """
    models = []
    for checkpoint in setup.checkpoints:
        with loading(checkpoint.path) as progress_fn:
            models.append(checkpoint.load(progress_fn))
    return _with_models(setup, models)


def load(target: Path | None, draft: str | None, tokenizer: Path | None, *, dtype: str | None = None) -> Setup:
    """Returns `read_weights(open_models(...))`."""
    return read_weights(open_models(target, draft, tokenizer, dtype=dtype))


def _with_models(setup: Setup, models: Sequence[Model]) -> Setup:
    """The setup with these models, the drafter's logits made to fit the target's."""
    target, *drafters = models
    fitted = with_vocab_size(drafters[0], vocab_size(target)) if drafters else setup.draft
    return setup._replace(target=target, draft=fitted)


def _sampling_advice(path: Path) -> str:
    """The sampling settings in the metadata of a GGUF file, in words; they are meant for llama.cpp's samplers."""
    prefix = "general.sampling."
    stated = {key: value for key, value in read_gguf(path).metadata.items() if key.startswith(prefix)}
    return ", ".join(f"{key.removeprefix(prefix)} = {brief(value)}" for key, value in stated.items())
