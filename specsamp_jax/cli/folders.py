"""The folders, files and ids of models that are given as options: found and checked before anything large is read."""

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from specsamp_jax._files import brief, check_format, read_json
from specsamp_jax._gguf import is_gguf
from specsamp_jax._hub import find_checkpoint, id_hint, is_id
from specsamp_jax.cli.shared import doing, talks

NGRAM = "ngram"
"""Value of `--draft` for drafts from the n-grams of the text itself."""

_WHISPER = "whisper"


def find_option(option: str, path: Path) -> Path:
    """Returns the folder or GGUF file of an option; a model of the Hugging Face hub is fetched if need be.

    Raises:
      ValueError: There is no such folder, file or model.
    """
    if not talks():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    return find_checkpoint(path, option)


@contextmanager
def loading(folder: Path) -> Iterator[Callable[[int, int], None]]:
    """Writes that a model is being loaded, its size and its device, and the seconds when it is loaded.

    Yields the `progress_fn` of the loader, which writes the share that is loaded.
    """
    files = [folder] if is_gguf(folder) else folder.glob("*.safetensors")
    size = sum(file.stat().st_size for file in files) / 1e9
    device = jax.devices()[0]
    with doing(f"loading {folder.name}, {size:.2f} GB, on {device.platform} ({device.device_kind})") as progress_fn:
        yield progress_fn


def draft_folder(draft: str | None) -> Path | None:
    """Returns the folder or GGUF file that `--draft` names; None for n-grams and for no drafter.

    Raises:
      ValueError: There is no such folder, file or model.
    """
    if draft in (None, NGRAM):
        return None
    is_close = difflib.get_close_matches(draft.lower(), [NGRAM])
    hint = f"; did you mean {NGRAM!r}?" if is_close else f"{id_hint(draft)}."
    if not (os.path.lexists(draft) or is_id(draft)):
        raise ValueError(f"--draft must be a folder or {NGRAM!r}, but there is no {draft}{hint}")
    return find_option("--draft", Path(draft))


def check_kind(option: str, folder: Path | None, *, speech: bool) -> None:
    """Raises ValueError if a folder holds a model of the other subcommand, a Whisper or one of text, or another format.

    Args:
      option: The option, for the error.
      folder: The folder or GGUF file. None, a missing config.json or one without `model_type` passes: the loader
        complains.
      speech: Whether a Whisper is needed.
    """
    if folder is None:
        return
    if is_gguf(folder):
        if speech:
            raise ValueError(f"{option} must be the folder of a Whisper, got the GGUF file {folder}.")
        return
    config = read_json(folder / "config.json", required=False)
    check_format(folder, config)
    kind = config.get("model_type")
    if not kind or (kind == _WHISPER) == speech:
        return
    if speech:
        raise ValueError(
            f"{option} must hold a Whisper, got model_type {brief(kind)}; `specsamp generate` is for text."
        )
    raise ValueError(f"{option} must hold a model of text, got a Whisper; `specsamp transcribe` is for speech.")
