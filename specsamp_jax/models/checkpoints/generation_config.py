"""generation_config.json of a checkpoint: how its authors want it to be sampled."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from specsamp_jax._files import read_json
from specsamp_jax._types import SamplingParams

_FILE = "generation_config.json"

# What transformers takes where the file has nothing.
_DEFAULTS = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
# Settings that change what is sampled, with the values at which they do not. None never does.
_NEUTRAL = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": (),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
    "watermarking_config": (),
}
# Settings that change no distribution, or that only beams read.
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
    """How a checkpoint wants to be sampled.

    Attributes:
      sampling: For `generate`.
      eos_token: The end tokens, for `generate`; possibly none.
    """

    sampling: SamplingParams
    eos_token: tuple[int, ...]


def load_generation_config(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> GenerationConfig:
    """Returns what generation_config.json in the folder `path` says, read as transformers reads it.

    Without `do_sample` it is greedy, whatever else it says; with it, a missing `top_k` is 50. A folder without the
    file is greedy, and ends with `eos_token_id` of config.json.

    Args:
      path: The folder.
      ignore: Settings that may say anything, for a caller who knows what they do.

    Raises:
      ValueError: The file is broken, or holds a setting that would change what is sampled and is not supported,
        such as a repetition penalty, or that is not known. `process_logits_fn` of `generate` may do what it asks.
    """
    path = Path(path)
    if not (path / _FILE).exists():
        return GenerationConfig(
            SamplingParams(temperature=0.0), _tokens(read_json(path / "config.json"), "config.json")
        )
    harmless = _HARMLESS.split()
    values = {key: value for key, value in read_json(path / _FILE).items() if value is not None}
    for key, value in values.items():
        if key in ignore or key in harmless or key in _DEFAULTS or key.startswith("_"):
            continue
        if value is False or value in _NEUTRAL.get(key, ()):
            continue
        what = "is not supported" if key in _NEUTRAL else "is not known here and might change what is sampled"
        raise ValueError(f"{path / _FILE} holds {key} = {value!r}, which {what}; ignore=({key!r},) leaves it out.")
    numbers = {key: values.get(key, default) for key, default in _DEFAULTS.items()}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} in {path / _FILE} must be a number, got {value!r}.")
    sampling = SamplingParams(**numbers) if values.get("do_sample") else SamplingParams(temperature=0.0)
    return GenerationConfig(sampling, _tokens(values, _FILE))


def _tokens(values: dict, name: str) -> tuple[int, ...]:
    tokens = values.get("eos_token_id")
    tokens = [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in tokens):
        raise ValueError(f"eos_token_id in {name} must be a token or a list of tokens, got {tokens!r}.")
    return tuple(tokens)
