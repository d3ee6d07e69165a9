"""The tokenizer of a checkpoint in Hugging Face's layout."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specsamp_jax._files import read_json
from specsamp_jax.text.chat import render_chat

_TOKENIZER = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass(frozen=True)
class CheckpointTokenizer:
    """Turns text and conversations into a model's tokens, and back.

    Attributes:
      tokenizer: What splits text.
      special_tokens: The names that special tokens have by their part (`bos_token`, `eos_token`, `unk_token`, ...).
      add_bos_token: Whether the token that begins a text is put in front because `tokenizer` does not do it itself.
      chat_templates: Jinja templates by name; the one without a name of its own is "default".
      path: The folder it was read from, for what an error says.
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
        tokens = self.tokenizer.encode(text).ids
        if self.add_bos_token and self.bos_token is not None:
            tokens = [self.bos_token, *tokens]
        return self._not_empty(tokens, f"The prompt {text!r}")

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, template: str | None = None, **variables: Any
    ) -> list[int]:
        """Returns the tokens of a conversation, up to where the assistant's next message begins.

        Args:
          messages: Each with `role` and `content`, first to last.
          template: The name of one of `chat_templates`. None: "tool_use" where `tools` are among the variables and
            there is one, else "default".
          **variables: What else the template may read, as in `render_chat`.

        Raises:
          ValueError: There is no such template, or it refuses the conversation.
        """
        name = template or ("tool_use" if variables.get("tools") and "tool_use" in self.chat_templates else "default")
        if name not in self.chat_templates:
            there = ", ".join(sorted(self.chat_templates)) or "none"
            raise ValueError(f"{self.path} must hold the chat template {name!r}; it holds {there}.")
        text = render_chat(self.chat_templates[name], messages, **{**self.special_tokens, **variables})
        # The template has written the special tokens out, the first one too.
        return self._not_empty(self.tokenizer.encode(text, add_special_tokens=False).ids, "The conversation")

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of some tokens, without the special ones."""
        return self.tokenizer.decode(tokens)

    def _special(self, part: str) -> int | None:
        name = self.special_tokens.get(part)
        return None if name is None else self.tokenizer.token_to_id(name)

    def _not_empty(self, tokens: list[int], what: str) -> list[int]:
        if not tokens:
            raise ValueError(f"{what} has no token by {self.path / _TOKENIZER}; at least one is needed.")
        return tokens


def load_tokenizer(path: str | os.PathLike[str]) -> CheckpointTokenizer:
    """Returns the tokenizer that the folder `path` holds.

    Special tokens and templates stand in `tokenizer_config.json`, where there is one. Templates in files of their own
    (`chat_template.jinja`, `additional_chat_templates`) go before those. Whether a text begins with a special token
    is decided by `tokenizer.json`, and by `add_bos_token` only if that says nothing of special tokens, as
    transformers 5 has it.

    Args:
      path: A folder with `tokenizer.json`.

    Raises:
      ValueError: A file is missing or broken.

    Example:
      >>> from specsamp_jax.cli.pair import ASSETS
      >>> tokenizer = load_tokenizer(ASSETS)
      >>> tokenizer.encode("Return the"), tokenizer.decode([0, 843, 269])
      ([0, 843, 269], 'Return the')
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"A tokenizer is read from a folder, but there is no folder {path}.")
    if not (path / _TOKENIZER).exists():
        if (path / "tokenizer.model").exists():
            raise ValueError(
                f"{path} must hold {_TOKENIZER}, and holds SentencePiece's tokenizer.model: "
                "transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder) makes the one of the other."
            )
        raise ValueError(f"{path} must hold {_TOKENIZER}, which is missing.")
    try:
        tokenizer = Tokenizer.from_file(str(path / _TOKENIZER))
    except Exception as error:  # the library raises nothing more special
        raise ValueError(f"{path / _TOKENIZER} is no tokenizer: {error}.") from error
    # A saved tokenizer may cut or fill texts to the length that it was trained with.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config = read_json(path / _CONFIG, required=False)
    special = {
        **_special_tokens(read_json(path / "special_tokens_map.json", required=False)),
        **_special_tokens(config),
    }
    add_bos_token = tokenizer.post_processor is None and config.get("add_bos_token") is True
    return CheckpointTokenizer(tokenizer, special, add_bos_token, _chat_templates(path, config), path)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by part; each stands as its name, or as an object that holds it as `content`."""
    named = {part: config[part] for part in _SPECIAL if config.get(part) is not None}
    return {part: token["content"] if isinstance(token, dict) else token for part, token in named.items()}


def _chat_templates(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {file.stem: file for file in sorted((path / "additional_chat_templates").glob("*.jinja"))}
    if (path / "chat_template.jinja").exists():
        files["default"] = path / "chat_template.jinja"
    if files:
        return {name: file.read_text(encoding="utf-8") for name, file in files.items()}
    template = config.get("chat_template") or read_json(path / "chat_template.json", required=False).get(
        "chat_template"
    )
    if isinstance(template, list):
        return {each["name"]: each["template"] for each in template}
    return {} if template is None else {"default": template}
