"""The text model in a checkpoint of Gemma 3 for text and images: its settings and its tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specsamp_jax._files import OBJECT, TEXT, brief, read_setting
from specsamp_jax.models.checkpoints.tensors import Stored

TYPE, TEXT_TYPE = "gemma3", "gemma3_text"
# Of transformers; published files state only the others.
_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
_IMAGES = tuple(prefix + part for prefix in ("", "model.") for part in ("vision_tower.", "multi_modal_projector."))


def text_settings(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Returns the settings of the text model in a config.json of type gemma3, as one of type gemma3_text has them.

    Raises:
      ValueError: `text_config` is missing, no object, or of another type.
    """
    text = read_setting(values, "text_config", OBJECT, source=file)
    if text is None or read_setting(text, "model_type", TEXT, source=file, default=TEXT_TYPE) != TEXT_TYPE:
        found = brief(None if text is None else text["model_type"])
        raise ValueError(f"text_config in {file} must be an object with model_type {TEXT_TYPE!r}, got {found}.")
    tokens = {"eos_token_id": values["eos_token_id"]} if "eos_token_id" in values else {}
    return {**_DEFAULTS, "model_type": TEXT_TYPE, **text, **tokens}


def text_tensors(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """Returns the tensors of the text model by the names that they have in a checkpoint for text."""
    found = {}
    for name, entry in stored.items():
        prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
        if not name.startswith(_IMAGES):
            found[_PREFIXES.get(prefix, "") + name.removeprefix(prefix)] = entry
    return found
