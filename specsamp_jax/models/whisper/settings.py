"""How a Whisper checkpoint is asked: its prompt and its rules, from generation_config.json."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specsamp_jax._files import read_json
from specsamp_jax.models.whisper.model import WhisperConfig
from specsamp_jax.models.whisper.rules import Rules, SuppressAtBegin, SuppressTokens, TimestampRules

_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class WhisperSettings:
    """The special tokens of a checkpoint and what it forbids.

    Attributes:
      start_token: Begins every prompt.
      end_tokens: Each ends a text; the first one is the end of the timestamp rules.
      suppress_tokens: Forbidden everywhere.
      begin_suppress_tokens: Forbidden as the first token of a text.
      no_timestamps_token: Ends a prompt for text without timestamps; the next token is the timestamp 0.00. None: the
        checkpoint has none, and no timestamps.
      languages: Code and token of each language; none of an English-only checkpoint.
      tasks: Name and token of each task; none of an English-only checkpoint.
      max_initial_timestamp_index: See `TimestampRules`.
      max_length: The longest text, its prompt included.
    """

    start_token: int
    end_tokens: tuple[int, ...]
    suppress_tokens: tuple[int, ...]
    begin_suppress_tokens: tuple[int, ...]
    no_timestamps_token: int | None
    languages: tuple[tuple[str, int], ...]
    tasks: tuple[tuple[str, int], ...]
    max_initial_timestamp_index: int | None
    max_length: int

    @property
    def first_timestamp(self) -> int | None:
        """The token of 0.00 s; None where there are none."""
        return None if self.no_timestamps_token is None else self.no_timestamps_token + 1

    def check(self, *, language: str | None, task: str | None, timestamps: bool) -> None:
        """Raises ValueError where the checkpoint cannot be asked for this."""
        if timestamps and self.no_timestamps_token is None:
            raise ValueError(f"timestamps need no_timestamps_token_id in {_FILE}, which does not hold it.")
        for name, value, known in (("language", language, self.languages), ("task", task, self.tasks)):
            if value is not None and not known:
                raise ValueError(f"{name} must be left out for an English-only model, got {value!r}.")
            if value is not None and value not in dict(known):
                raise ValueError(f"{name} must be one of {', '.join(dict(known))}, got {value!r}.")

    def prompt(self, *, language: str | None, task: str | None, timestamps: bool) -> tuple[int, ...]:
        """Returns the tokens that a text is forced to begin with.

        Args:
          language: A code among `languages`; must be given where there are any.
          task: A name among `tasks`. None: "transcribe" where there are any.
          timestamps: Whether the text shall have timestamps.

        Raises:
          ValueError: The checkpoint has no such language, task or timestamps.
        """
        self.check(language=language, task=task, timestamps=timestamps)
        tokens = [self.start_token]
        if self.languages:
            if language is None:
                raise ValueError(f"language must be one of {', '.join(dict(self.languages))}, got None.")
            tokens += [dict(self.languages)[language], dict(self.tasks)[task or "transcribe"]]
        if self.no_timestamps_token is not None and not timestamps:
            tokens.append(self.no_timestamps_token)
        return tuple(tokens)

    def prompt_length(self, *, timestamps: bool) -> int:
        """Returns how many tokens every prompt has."""
        return 1 + 2 * bool(self.languages) + (self.no_timestamps_token is not None and not timestamps)

    def rules(self, begin: int, *, timestamps: bool) -> Rules:
        """Returns the rules of a text behind a prompt of `begin` tokens, as a `process_logits_fn`."""
        rules = [SuppressAtBegin(self.begin_suppress_tokens, begin), SuppressTokens(self.suppress_tokens)]
        if timestamps and self.first_timestamp is not None:
            rules.append(
                TimestampRules(begin, self.end_tokens[0], self.first_timestamp, self.max_initial_timestamp_index)
            )
        return Rules(tuple(rules))


def load_settings(path: str | os.PathLike[str], config: WhisperConfig) -> WhisperSettings:
    """Returns what the generation_config.json in the folder `path` says.

    Args:
      path: The folder of a checkpoint.
      config: Its config, whose vocabulary the tokens are of.

    Raises:
      ValueError: The file is missing or broken, lacks an entry, or holds a token outside the vocabulary.
    """
    file = Path(path) / _FILE
    values = read_json(file, holder="A Whisper checkpoint")

    def tokens(name: str, value: Any) -> tuple[int, ...]:
        found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        for token in found:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} in {file} must be tokens from 0 to {config.vocab_size - 1}, vocab_size being "
                    f"{config.vocab_size}; got {token!r}."
                )
        return found

    def needed(name: str) -> tuple[int, ...]:
        if not (found := tokens(name, values.get(name))):
            raise ValueError(f"{file} must hold {name}, which it does not.")
        return found

    def table(name: str, clean: str = "") -> tuple[tuple[str, int], ...]:
        found = values.get(name)
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"{file} must hold {name}, for the model is multilingual.")
        for key, token in found.items():
            if not tokens(f"{name}.{key}", token):
                raise ValueError(f"{name}.{key} in {file} must be a token, got null.")
        return tuple((key.strip(clean), token) for key, token in found.items())

    multilingual = values.get("is_multilingual", "lang_to_id" in values)
    no_timestamps = tokens("no_timestamps_token_id", values.get("no_timestamps_token_id"))
    return WhisperSettings(
        start_token=needed("decoder_start_token_id")[0],
        end_tokens=needed("eos_token_id"),
        suppress_tokens=tokens("suppress_tokens", values.get("suppress_tokens")),
        begin_suppress_tokens=tokens("begin_suppress_tokens", values.get("begin_suppress_tokens")),
        no_timestamps_token=no_timestamps[0] if no_timestamps else None,
        languages=table("lang_to_id", "<|>") if multilingual else (),
        tasks=table("task_to_id") if multilingual else (),
        max_initial_timestamp_index=values.get("max_initial_timestamp_index"),
        max_length=min(values.get("max_length") or config.max_target_positions, config.max_target_positions),
    )
