"""Settings of generation_config.json that change logits, read with their types, and the processor that they make."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from specsamp_jax._files import Kind, brief, number, read_setting, whole_number
from specsamp_jax._types import SamplingParams
from specsamp_jax.decoding import processors, truncation
from specsamp_jax.decoding.drafters import ProcessLogitsFn


class LogitsSettings(NamedTuple):
    """Settings that change the logits of target and draft alike; each is off by default.

    All but the penalties on counts are those of transformers, under its names. These two are those of the OpenAI API,
    which transformers does not have.

    Attributes:
      repetition_penalty: Divides positive and multiplies negative logits of tokens in the text, prompt included.
      presence_penalty: Subtracted from the logits of generated tokens.
      frequency_penalty: Subtracted from the logit of a generated token for each of its occurrences.
      no_repeat_ngram_size: n of the n-grams that no text, prompt included, has twice. 0 is off.
      bad_words_ids: Sequences of tokens that are never generated. A single end token among them has no effect.
      min_length: Length of a text, prompt included, before which it does not end.
      min_new_tokens: Number of generated tokens before which a text does not end.
      suppress_tokens: Tokens that are never generated.
      begin_suppress_tokens: Tokens that are not generated as the first.
      forced_bos_token_id: The token that follows a prompt of one token.
      typical_p: The probability that typical decoding keeps. 1 is off.
      epsilon_cutoff: The smallest probability of a token that is kept. 0 is off.
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0


_ABOVE_ZERO = Kind("a finite number above 0", lambda value: number(0).accepts(value) and value > 0)
_SHARE = Kind("a number above 0 and at most 1", lambda value: number(0, 1).accepts(value) and value > 0)
_BELOW_ONE = Kind("a number of at least 0 and below 1", lambda value: number(0, 1).accepts(value) and value < 1)


def _kinds(vocab_size: int) -> dict[str, Kind]:
    """The values that each setting may have."""
    token = whole_number(0, vocab_size - 1).accepts

    def is_sequence(value: Any) -> bool:
        return isinstance(value, list) and all(map(token, value))

    def are_sequences(value: Any) -> bool:
        return isinstance(value, list) and all(each and is_sequence(each) for each in value)

    among = f"from 0 to {vocab_size - 1}"
    tokens = Kind(f"a list of tokens {among}", is_sequence)
    return {
        "repetition_penalty": _ABOVE_ZERO,
        "presence_penalty": number(-2, 2),
        "frequency_penalty": number(-2, 2),
        "no_repeat_ngram_size": whole_number(0),
        "bad_words_ids": Kind(f"a list of lists of one token or more, each {among}", are_sequences),
        "min_length": whole_number(0),
        "min_new_tokens": whole_number(0),
        "suppress_tokens": tokens,
        "begin_suppress_tokens": tokens,
        "forced_bos_token_id": Kind(f"a token {among}", token),
        "typical_p": _SHARE,
        "epsilon_cutoff": _BELOW_ONE,
    }


def read_logits_settings(values: Mapping[str, Any], file: Path, vocab_size: int) -> LogitsSettings:
    """Returns the settings among the values of a generation_config.json.

    Args:
      values: The contents of the file.
      file: The file, for errors.
      vocab_size: Bounds the tokens.

    Raises:
      ValueError: A setting has a value of the wrong type or range.
    """
    found = {}
    for name, kind in _kinds(vocab_size).items():
        try:
            value = read_setting(values, name, kind, source=file)
        except ValueError as error:
            raise ValueError(f"{str(error).removesuffix('.')}; {leave_out(name)}") from None
        if value is not None:
            found[name] = _frozen(value)
    return LogitsSettings(**found)


def leave_out(name: str) -> str:
    """Returns the end of a sentence about a setting that cannot be read: the way around it."""
    return f"ignore=({name!r},), or --ignore {brief(name)[1:-1]} of the command, leaves it out."


def make_processors(
    settings: LogitsSettings,
    sampling: SamplingParams,
    *,
    eos_token: tuple[int, ...],
    prompt_lengths: Int[np.ndarray, "B"],
) -> tuple[SamplingParams, ProcessLogitsFn | None]:
    """Returns `sampling` and `process_logits_fn` of `generate` for these settings.

    The order is that of transformers, but a forced token is forced even if another setting forbids it. Where
    `typical_p` or `epsilon_cutoff` is on and the temperature is not 0, the filters of `sampling` come before it, and
    move from the sampling parameters to the processor.

    Args:
      settings: The settings.
      sampling: Python numbers, as `load_generation_config` returns them.
      eos_token: The end tokens.
      prompt_lengths: Tokens of each prompt.
    """
    chain: list[ProcessLogitsFn] = []
    if settings.repetition_penalty != 1:
        chain.append(processors.RepetitionPenalty(settings.repetition_penalty))
    if settings.presence_penalty or settings.frequency_penalty:
        penalties = settings.presence_penalty, settings.frequency_penalty
        chain.append(processors.CountPenalty(*penalties, prompt_lengths))
    if settings.no_repeat_ngram_size:
        chain.append(processors.NoRepeatNGram(settings.no_repeat_ngram_size))
    words = tuple(word for word in settings.bad_words_ids if not (len(word) == 1 and word[0] in eos_token))
    if words:
        chain.append(processors.ForbidSequences(words))
    if eos_token and settings.min_length:
        chain.append(processors.SuppressBefore(eos_token, settings.min_length))
    if eos_token and settings.min_new_tokens:
        chain.append(processors.SuppressBefore(eos_token, prompt_lengths + settings.min_new_tokens))
    if settings.suppress_tokens:
        chain.append(processors.SuppressTokens(settings.suppress_tokens))
    if settings.begin_suppress_tokens:
        # The first token after the forced one, if a token is forced.
        forced = (prompt_lengths == 1) & (settings.forced_bos_token_id is not None)
        chain.append(processors.SuppressBefore(settings.begin_suppress_tokens, prompt_lengths + 1 + forced))
    if settings.forced_bos_token_id is not None:
        chain.append(processors.ForceToken(settings.forced_bos_token_id, 1))
    truncations: list[ProcessLogitsFn] = []
    if settings.typical_p < 1:
        truncations.append(truncation.Typical(settings.typical_p, sampling.temperature))
    if settings.epsilon_cutoff > 0:
        truncations.append(truncation.EpsilonCutoff(settings.epsilon_cutoff, sampling.temperature))
    if truncations and sampling.temperature != 0:
        if sampling != SamplingParams(sampling.temperature):
            chain.append(truncation.Filters(sampling))
        chain += truncations
        sampling = SamplingParams(sampling.temperature)
    return sampling, processors.Chain(tuple(chain)) if chain else None


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
