"""Tokenizers and chat templates of checkpoints: folders in Hugging Face's layout, and GGUF files."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specsamp_jax._files import BOOLEAN, Kind, read_json, read_setting, read_text
from specsamp_jax._gguf import is_gguf, read_gguf
from specsamp_jax._hub import find_checkpoint
from specsamp_jax.text.chat import render_chat
from specsamp_jax.text.gguf_tokenizer import build_tokenizer
from specsamp_jax.text.tokenizer_file import no_panic, read_tokenizer

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class CheckpointTokenizer:
    """Converts text and conversations to a model's tokens, and tokens to text.

    Attributes:
      tokenizer: The tokenizer of the `tokenizers` library.
      special_tokens: The text of each special token, by role (`bos_token`, `eos_token`, `unk_token`, ...).
      add_bos_token: Whether `encode` adds `bos_token`, because `tokenizer` does not add it itself.
      chat_templates: Jinja templates by name; an unnamed one is "default".
      path: The folder or file that it was read from, for error messages.
    """

    tokenizer: Tokenizer
    special_tokens: Mapping[str, str]
    add_bos_token: bool
    chat_templates: Mapping[str, str]
    path: Path

    @property
    def bos_token(self) -> int | None:
        """The token that begins a text."""
        return self._special("bos_token")

    @property
    def eos_token(self) -> int | None:
        """The token that ends a text."""
        return self._special("eos_token")

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of a text, with the special tokens that the checkpoint puts around one.

        Raises:
          ValueError: The text has no token.
        """
        tokens = no_panic(self.tokenizer.encode, text).ids
        if self.add_bos_token and self.bos_token is not None:
            tokens = [self.bos_token, *tokens]
        return self._not_empty(tokens, f"The prompt {text!r}")

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, **variables: Any
    ) -> list[int]:
        """Returns the tokens of a conversation, up to the beginning of the assistant's next message.

        Args:
          messages: Each with `role` and `content`, first to last.
          template: The name of one of `chat_templates`. None: "tool_use" if it exists and `tools` is among the
            variables, else "default".
          **variables: Other variables of the template, as in `render_chat`.

        Raises:
          ValueError: There is no such template, or it refuses the conversation.
        """
        name = template or ("tool_use" if variables.get("tools") and "tool_use" in self.chat_templates else "default")
        if name not in self.chat_templates:
            if not self.chat_templates:
                raise ValueError(
                    f"{self.path} has no chat template, as is usual for base models: it can continue a text, "
                    "but not answer a conversation."
                )
            names = ", ".join(sorted(self.chat_templates))
            raise ValueError(f"{self.path} must hold the chat template {name!r}; it holds {names}.")
        text = render_chat(self.chat_templates[name], messages, **{**self.special_tokens, **variables})
        # The template writes all special tokens, including the first.
        tokens = no_panic(self.tokenizer.encode, text, add_special_tokens=False).ids
        return self._not_empty(tokens, "The conversation")

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, without the special ones."""
        return no_panic(self.tokenizer.decode, tokens)

    def _special(self, role: str) -> int | None:
        name = self.special_tokens.get(role)
        return None if name is None else self.tokenizer.token_to_id(name)

    def _not_empty(self, tokens: list[int], what: str) -> list[int]:
        if not tokens:
            raise ValueError(f"{what} has no token by the tokenizer of {self.path}; at least one is needed.")
        return tokens


def load_tokenizer(path: str | os.PathLike[str]) -> CheckpointTokenizer:
    """Returns the tokenizer in the folder or GGUF file `path`.

    Special tokens and templates are read from `tokenizer_config.json`, if it exists. Templates in files of their own
    (`chat_template.jinja`, `additional_chat_templates`) take precedence. Whether a text begins with a special token
    is decided by `tokenizer.json`, and by `add_bos_token` only if `tokenizer.json` has no post-processor, as in
    transformers 5.

    Args:
      path: A folder with `tokenizer.json`; a GGUF file, whose tokenizer is a byte-level BPE or SentencePiece's; or,
        where no such folder is, the id of a model of the Hugging Face hub.

    Raises:
      ValueError: A file is missing, broken or no regular file, or holds a value of the wrong type.

    Example:
      >>> from specsamp_jax.cli.pair import ASSETS
      >>> tokenizer = load_tokenizer(ASSETS)
      >>> tokenizer.encode("Return the"), tokenizer.decode([0, 843, 269])
      ([0, 843, 269], 'Return the')
    """
    path = find_checkpoint(path)
    if is_gguf(path):
        tokenizer, special, templates = build_tokenizer(read_gguf(path))
        return CheckpointTokenizer(tokenizer, special, False, templates, path)
    if not (path / _TOKENIZER).exists():
        if (path / "tokenizer.model").exists():
            raise ValueError(
                f"{path} must hold {_TOKENIZER}, and holds SentencePiece's tokenizer.model: "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) converts it."
            )
        raise ValueError(f"{path} must hold {_TOKENIZER}, which is missing.")
    tokenizer = read_tokenizer(path / _TOKENIZER)
    config_file = path / _CONFIG
    config = read_json(config_file, required=False)
    special = _special_tokens(path / "special_tokens_map.json") | _special_tokens(config_file)
    add_bos_token = read_setting(config, "add_bos_token", BOOLEAN, source=config_file, default=False)
    add_bos_token = add_bos_token and tokenizer.post_processor is None
    return CheckpointTokenizer(tokenizer, special, add_bos_token, _chat_templates(path), path)


def _special_tokens(file: Path) -> dict[str, str]:
    """Special tokens by role; each is written as its text, or as an object that holds the text as `content`."""
    values = read_json(file, required=False)
    tokens = {role: read_setting(values, role, _TOKEN, source=file) for role in _SPECIAL}
    return {
        role: token["content"] if isinstance(token, dict) else token
        for role, token in tokens.items()
        if token is not None
    }


def _chat_templates(path: Path) -> dict[str, str]:
    """Templates by name: those in files of their own, else those in a JSON file."""
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if os.path.lexists(path / "chat_template.jinja"):
        files["default"] = path / "chat_template.jinja"
    if files:
        return {name: read_text(file) for name, file in files.items()}
    for file in (path / _CONFIG, path / "chat_template.json"):
        template = read_setting(read_json(file, required=False), "chat_template", _TEMPLATES, source=file)
        if isinstance(template, list):
            return {each["name"]: each["template"] for each in template}
        if template:
            return {"default": template}
    return {}


def _is_token(value: Any) -> bool:
    return isinstance(value.get("content") if isinstance(value, dict) else value, str)


def _is_template(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(isinstance(each, dict) and _is_named_template(each) for each in value)


def _is_named_template(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("name"), str) and isinstance(value.get("template"), str)


_TOKEN = Kind("text, or an object with the text as content", _is_token)
_TEMPLATES = Kind("text, or a list of objects with name and template", _is_template)
