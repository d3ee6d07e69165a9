"""Prompts, special tokens and rules of a Whisper checkpoint, from its generation_config.json."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from specsamp_jax._files import BOOLEAN, brief, read_json, read_setting, whole_number
from specsamp_jax.decoding.processors import SuppressTokens
from specsamp_jax.models.whisper.model import WhisperConfig
from specsamp_jax.models.whisper.rules import Rules, SuppressAtBegin, TimestampRules

_FILE = "generation_config.json"


@dataclasses.dataclass(frozen=True)
class WhisperSettings:
    """Special tokens of a Whisper checkpoint, and the tokens that it forbids.

    Attributes:
      start_token: The first token of every prompt.
      end_tokens: The tokens that end a text; the first of them is the `end_token` of `TimestampRules`.
      suppress_tokens: Tokens that are forbidden everywhere.
      begin_suppress_tokens: Tokens that are forbidden as the first token of a text.
      no_timestamps_token: The last token of a prompt for text without timestamps; the token after it in the
        vocabulary is the timestamp 0.00. None: the checkpoint has no timestamps.
      languages: Code and token of each language; empty for an English-only checkpoint.
      tasks: Name and token of each task; empty for an English-only checkpoint.
      max_initial_timestamp_index: See `TimestampRules`.
      max_length: The longest text, including its prompt.
      alignment_heads: Layer and head of each cross-attention that follows the sound; see `heads`.
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
    alignment_heads: tuple[tuple[int, int], ...] | None

    @property
    def first_timestamp(self) -> int | None:
        """The token of 0.00 s; None if the checkpoint has no timestamps."""
        return None if self.no_timestamps_token is None else self.no_timestamps_token + 1

    @property
    def no_speech_token(self) -> int | None:
        """The token of "no speech", the one before `no_timestamps_token`; None if the checkpoint has no timestamps."""
        return None if self.no_timestamps_token is None else self.no_timestamps_token - 1

    def heads(self, config: WhisperConfig) -> tuple[tuple[int, int], ...]:
        """Returns layer and head of each cross-attention for word times.

        Those of `alignment_heads`; where they are missing, all in the last half of the layers.

        Raises:
          ValueError: A head that the model does not have. A drafter may hold the list of its target.
        """
        layers, heads = config.decoder_layers, config.decoder_attention_heads
        if self.alignment_heads is None:
            return tuple((layer, head) for layer in range(layers // 2, layers) for head in range(heads))
        for layer, head in self.alignment_heads:
            if layer >= layers or head >= heads:
                raise ValueError(
                    f"alignment_heads in {_FILE} must be pairs of a layer below {layers} and a head below {heads}, by "
                    f"the config; got [{layer}, {head}]. The list may be that of another model."
                )
        return self.alignment_heads

    def check(self, *, language: str | None, task: str | None, timestamps: bool) -> None:
        """Raises ValueError if the checkpoint does not support these options."""
        if timestamps and self.no_timestamps_token is None:
            raise ValueError(f"timestamps need no_timestamps_token_id in {_FILE}, which does not hold it.")
        for name, value, allowed in (("language", language, self.languages), ("task", task, self.tasks)):
            if value is not None and not allowed:
                raise ValueError(f"{name} must be left out for an English-only model, got {value!r}.")
            if value is not None and value not in dict(allowed):
                raise ValueError(f"{name} must be one of {', '.join(dict(allowed))}, got {value!r}.")

    def prompt(self, *, language: str | None, task: str | None, timestamps: bool) -> tuple[int, ...]:
        """Returns the tokens that come before a text.

        Args:
          language: A code among `languages`; required for a multilingual model.
          task: A name among `tasks`. None: "transcribe" for a multilingual model.
          timestamps: Whether the text has timestamps.

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
        """Returns the number of tokens in every prompt."""
        return 1 + 2 * bool(self.languages) + (self.no_timestamps_token is not None and not timestamps)

    def rules(self, begin: int, *, timestamps: bool) -> Rules:
        """Returns the rules of a text after a prompt of `begin` tokens, as a `process_logits_fn`."""
        rules = [SuppressAtBegin(self.begin_suppress_tokens, begin), SuppressTokens(self.suppress_tokens)]
        if timestamps and self.first_timestamp is not None:
            rules.append(
                TimestampRules(begin, self.end_tokens[0], self.first_timestamp, self.max_initial_timestamp_index)
            )
        return Rules(tuple(rules))


def load_settings(path: str | os.PathLike[str], config: WhisperConfig) -> WhisperSettings:
    """Returns the settings in the generation_config.json of the folder `path`.

    Args:
      path: The folder of a checkpoint.
      config: Its config, which bounds the tokens and the length.

    Raises:
      ValueError: The file is missing or broken, lacks an entry, or holds a value of the wrong type or a token outside
        the vocabulary.
    """
    file = Path(path) / _FILE
    values = read_json(file, holder="A Whisper checkpoint")

    def tokens(name: str, value: Any) -> tuple[int, ...]:
        found = tuple(value) if isinstance(value, list) else () if value is None else (value,)
        for token in found:
            if type(token) is not int or not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"{name} in {file} must be tokens from 0 to {config.vocab_size - 1}, vocab_size being "
                    f"{config.vocab_size}; got {brief(token)}."
                )
        return found

    def required(name: str) -> tuple[int, ...]:
        if not (found := tokens(name, values.get(name))):
            raise ValueError(f"{file} must hold {name}, which it does not.")
        return found

    def table(name: str, clean: str = "") -> tuple[tuple[str, int], ...]:
        found = values.get(name)
        if not isinstance(found, Mapping) or not found:
            raise ValueError(f"{file} must hold {name}, because the model is multilingual.")
        for key, token in found.items():
            if not tokens(f"{name}.{key}", token):
                raise ValueError(f"{name}.{key} in {file} must be a token, got null.")
        return tuple((key.strip(clean), token) for key, token in found.items())

    multilingual = read_setting(values, "is_multilingual", BOOLEAN, source=file, default="lang_to_id" in values)
    max_initial = read_setting(values, "max_initial_timestamp_index", whole_number(0), source=file)
    longest = config.max_target_positions
    max_length = read_setting(values, "max_length", whole_number(1), source=file, default=longest)
    no_timestamps = tokens("no_timestamps_token_id", values.get("no_timestamps_token_id"))
    tasks = table("task_to_id") if multilingual else ()
    if multilingual and "transcribe" not in dict(tasks):
        raise ValueError(f"task_to_id in {file} must hold 'transcribe', got {', '.join(dict(tasks))}.")
    return WhisperSettings(
        start_token=required("decoder_start_token_id")[0],
        end_tokens=required("eos_token_id"),
        suppress_tokens=tokens("suppress_tokens", values.get("suppress_tokens")),
        begin_suppress_tokens=tokens("begin_suppress_tokens", values.get("begin_suppress_tokens")),
        no_timestamps_token=no_timestamps[0] if no_timestamps else None,
        languages=table("lang_to_id", "<|>") if multilingual else (),
        tasks=tasks,
        max_initial_timestamp_index=max_initial,
        max_length=min(max_length, longest),
        alignment_heads=_alignment_heads(values.get("alignment_heads"), file),
    )


def _alignment_heads(value: Any, file: Path) -> tuple[tuple[int, int], ...] | None:
    if value is None:
        return None
    if not isinstance(value, list) or not value:
        raise ValueError(f"alignment_heads in {file} must be a list of pairs of numbers, got {brief(value)}.")
    for pair in value:
        if not isinstance(pair, list) or [type(index) for index in pair] != [int, int] or min(pair) < 0:
            raise ValueError(
                f"alignment_heads in {file} must be pairs of a layer and a head from 0 on, got {brief(pair)}."
            )
    return tuple((layer, head) for layer, head in value)
