"""Models of the Hugging Face hub: a model's id becomes the folder of its files, from the local cache or fetched."""

import importlib
import json
import os
import re
from pathlib import Path

from specsamp_jax._gguf import is_gguf

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_EXAMPLE = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    _WEIGHTS,
    _INDEX,
    "model-*-of-*.safetensors",
)
"""Patterns of the files that are fetched: those that the loaders read."""


def find_checkpoint(path: str | os.PathLike[str], name: str = "path") -> Path:
    """Returns the folder or GGUF file of a checkpoint.

    A path that exists is returned as it is. Otherwise `organisation/name` is the id of a model of the Hugging Face hub:
    its folder in the hub's cache if it is complete there, else after fetching what is missing.

    Args:
      path: A folder, a GGUF file, or an id.
      name: The argument, for the error.

    Raises:
      ValueError: It is none of them, or the model cannot be fetched.
    """
    text, path = str(path), Path(path)
    if path.is_dir() or is_gguf(path):
        return path
    if os.path.lexists(path):
        raise ValueError(f"{name} must be a folder or a GGUF file, got the file {path}.")
    if not is_id(text):
        raise ValueError(f"{name} must be a folder, but there is no {path}{id_hint(text)}.")
    cached = _cached(text)
    return cached if cached is not None and is_complete(cached) else _fetch(text, name)


def is_id(text: str) -> bool:
    """Whether a path, which does not exist, has the form of a model's id.

    A path into a folder that exists has not: it is a mistake in the path, and is sent to nobody.
    """
    has_form = _ID.fullmatch(text) is not None and ".." not in text and not text.lower().endswith(".gguf")
    return has_form and not Path(text).parent.is_dir()


def id_hint(text: str) -> str:
    """Returns the end of an error that explains ids, if `text` looks like a model's name without its organisation."""
    is_name = _NAME.fullmatch(text) is not None and any(map(str.isdigit, text)) and not text.lower().endswith(".gguf")
    return f"; a model of the Hugging Face hub is named ORG/NAME, for instance {_EXAMPLE}" if is_name else ""


def cache_folder() -> Path:
    """Returns the hub's cache: of the environment variables HF_HUB_CACHE or HF_HOME, or ~/.cache/huggingface/hub."""
    if folder := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or f"{base}/huggingface").expanduser() / "hub"


def _cached(text: str) -> Path | None:
    """The newest files of a model in the cache: those of the commit to which its branch main pointed last."""
    folder = cache_folder() / f"models--{text.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return folder / "snapshots" / commit if re.fullmatch(r"[0-9a-f]{7,64}", commit) else None


def is_complete(folder: Path) -> bool:
    """Whether a folder has the config, the tokenizer and all weights of a checkpoint."""
    if not all((folder / name).is_file() for name in ("config.json", "tokenizer.json")):
        return False
    if (folder / _WEIGHTS).is_file():
        return True
    try:
        files = json.loads((folder / _INDEX).read_bytes())["weight_map"].values()
        return all((folder / file).is_file() for file in files)
    except (AttributeError, KeyError, OSError, TypeError, ValueError, RecursionError):
        return False


def _fetch(text: str, name: str) -> Path:
    begin = f"{name}: there is no folder {text}, the cache {cache_folder()} does not hold this model whole, and"
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        raise ValueError(
            f"{begin} the package huggingface_hub, which fetches models, is not installed: install specsamp[hub]."
        ) from None
    try:
        folder = Path(hub.snapshot_download(text, allow_patterns=list(FILES), cache_dir=str(cache_folder())))
        if not is_complete(folder):
            # Without a network the call above returns the part in the cache; this one raises an error.
            hub.model_info(text)
    except Exception as error:  # of the network, of the hub, and of the disk: more classes than can be listed
        raise ValueError(f"{begin} it cannot be fetched from the Hugging Face hub: {_reason(error)}.") from error
    if not is_complete(folder):
        raise ValueError(
            f"{name}: {text} has no config.json, tokenizer.json and weights in safetensors on the Hugging Face hub; "
            "other forms cannot be loaded."
        )
    return folder


def _reason(error: BaseException) -> str:
    """An error of `huggingface_hub` in a few words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "its licence must be accepted on its page, and a token of the account set in HF_TOKEN"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such model, or it is private and HF_TOKEN is not set"
    if "OfflineModeIsEnabled" in kinds or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    if kinds & {"LocalEntryNotFoundError", "ConnectError", "ConnectTimeout", "ConnectionError", "Timeout"}:
        return "the network does not reach it"
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + first[0].rstrip('.') if first else ''}"
