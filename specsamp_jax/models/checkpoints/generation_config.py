"""generation_config.json of a checkpoint: sampling parameters, end tokens and settings that its authors chose."""

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Int

from specsamp_jax._files import BOOLEAN, brief, number, read_json, read_setting, whole_number
from specsamp_jax._gguf import is_gguf, read_gguf
from specsamp_jax._hub import find_checkpoint
from specsamp_jax._types import SamplingParams
from specsamp_jax.decoding.drafters import ProcessLogitsFn
from specsamp_jax.models.checkpoints import gguf_config
from specsamp_jax.models.checkpoints.logits_settings import (
    LogitsSettings,
    leave_out,
    make_processors,
    read_logits_settings,
)

_FILE = "generation_config.json"

# Sampling parameters: the values allowed, and what transformers uses for a missing one.
_SAMPLING = {
    "temperature": (number(0), 1.0),
    "top_k": (whole_number(0), 50),
    "top_p": (number(0, 1), 1.0),
    "min_p": (number(0, 1), 0.0),
}
# Settings that change the distribution, with the values that leave it unchanged. None always does.
_NEUTRAL = {
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": (),
    "stop_strings": (),
    "top_h": (),
    "watermarking_config": (),
}
# Settings that do not change the distribution, or that only beam search reads.
_HARMLESS = (
    "assistant_confidence_threshold assistant_early_exit assistant_lookbehind bos_token_id cache_config "
    "cache_implementation chat_format compile_config decoder_start_token_id disable_compile do_sample early_stopping "
    "eos_token_id is_assistant length_penalty low_memory max_length max_matching_ngram_size max_new_tokens "
    "max_window_size num_assistant_tokens num_assistant_tokens_schedule num_return_sequences output_attentions "
    "output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens "
    "renormalize_logits return_dict_in_generate target_lookbehind token_healing transformers_version use_cache "
    "user_token_id assistant_token_id trust_remote_code"
)


class GenerationConfig(NamedTuple):
    """Settings of a checkpoint; `sampling_and_processor` makes arguments of `generate` of them.

    Attributes:
      sampling: The sampling parameters.
      eos_token: The end tokens, possibly none.
      logits: The settings that change logits before `sampling`.
      stated_sampling: The sampling parameters that the file states, whether or not it samples; the others are off.
    """

    sampling: SamplingParams
    eos_token: tuple[int, ...]
    logits: LogitsSettings = LogitsSettings()
    stated_sampling: SamplingParams = SamplingParams()


def load_generation_config(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> GenerationConfig:
    """Returns the settings in generation_config.json of the folder `path`, read as transformers reads them.

    Without `do_sample` decoding is greedy and the sampling parameters of the file are not applied; with it, a missing
    `top_k` is 50. A folder without the file is greedy, and its end tokens are `eos_token_id` of config.json. A GGUF
    file is greedy, too; its end tokens are those that it states, and special tokens that are known to end a turn.

    Args:
      path: The folder, the GGUF file, or the id of a model of the Hugging Face hub.
      ignore: Settings to leave out, whatever their values.

    Raises:
      ValueError: The file is broken; a value has the wrong type or range; a token is not in the vocabulary of
        config.json; or a setting that would change the distribution is unknown or not supported, such as beam
        search. `process_logits_fn` of `generate` can implement such a setting.
    """
    path, greedy = find_checkpoint(path), SamplingParams(temperature=0.0)
    if is_gguf(path):
        config = gguf_config.read_config(read_gguf(path))
        return GenerationConfig(greedy, () if "eos_token_id" in ignore else _end_tokens(config, path, config))
    file, config_file = path / _FILE, path / "config.json"
    if not os.path.lexists(file):
        config = read_json(config_file)
        return GenerationConfig(greedy, () if "eos_token_id" in ignore else _end_tokens(config, config_file, config))
    accepted = {*_HARMLESS.split(), *_SAMPLING, *LogitsSettings._fields}
    values = {key: value for key, value in read_json(file).items() if value is not None and key not in ignore}
    for key, value in values.items():
        if key in accepted or key.startswith("_") or value is False or value in _NEUTRAL.get(key, ()):
            continue
        what = "is not supported" if key in _NEUTRAL else "is unknown and might change what is sampled"
        raise ValueError(f"{file} holds {key} = {brief(value)}, which {what}; {leave_out(key)}")
    defaults = {key: default for key, (_, default) in _SAMPLING.items()}
    sampling, stated = (
        SamplingParams(
            **{
                key: read_setting(values, key, kind, source=file, default=default[key])
                for key, (kind, _) in _SAMPLING.items()
            }
        )
        for default in (defaults, SamplingParams()._asdict())
    )
    do_sample = read_setting(values, "do_sample", BOOLEAN, source=file, default=False)
    config = read_json(config_file, required=False)
    return GenerationConfig(
        sampling if do_sample else greedy,
        _end_tokens(values, file, config),
        read_logits_settings(values, file, _vocab_size(config, config_file)),
        sampling if do_sample else stated,
    )


def sampling_and_processor(
    config: GenerationConfig, prompt_lengths: Sequence[int] | Int[Array | np.ndarray, "B"]
) -> tuple[SamplingParams, ProcessLogitsFn | None]:
    """Returns the arguments `sampling` and `process_logits_fn` of `generate` for a checkpoint's settings.

    The processor is None if no setting changes logits. It is a pytree: another batch of prompts needs no new trace.

    Args:
      config: From `load_generation_config`; `_replace` changes a setting.
      prompt_lengths: Tokens of each prompt.

    Example:
      >>> config = GenerationConfig(SamplingParams(0.7, 20), (2,), LogitsSettings(repetition_penalty=1.05))
      >>> sampling, process_logits_fn = sampling_and_processor(config, [5, 3])
      >>> sampling.top_k, process_logits_fn
      (20, Chain(processors=(RepetitionPenalty(penalty=1.05),)))
    """
    lengths = np.asarray(prompt_lengths, np.int32)
    return make_processors(config.logits, config.sampling, eos_token=config.eos_token, prompt_lengths=lengths)


def _end_tokens(values: Mapping[str, Any], file: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens in `values`, checked against the vocabulary that `config` states, if it does."""
    listed = values.get("eos_token_id")
    tokens = [] if listed is None else listed if isinstance(listed, list) else [listed]
    size = _vocab_size(config, file.parent / "config.json")
    if not all(type(token) is int and 0 <= token < size for token in tokens):
        raise ValueError(
            f"eos_token_id in {file} must be a token or a list of tokens, from 0 to {size - 1}, got {brief(listed)}; "
            f"{leave_out('eos_token_id')}"
        )
    return tuple(tokens)


def _vocab_size(config: Mapping[str, Any], file: Path) -> int:
    """The vocabulary that a config.json states; unbounded if it states none."""
    return read_setting(config, "vocab_size", whole_number(1), source=file, default=2**31)
