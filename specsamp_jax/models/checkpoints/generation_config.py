"""generation_config.json of a checkpoint: the sampling parameters and end tokens that its authors chose."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from specsamp_jax._files import BOOLEAN, brief, number, read_json, read_setting, whole_number
from specsamp_jax._types import SamplingParams

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
    """Sampling parameters and end tokens of a checkpoint, as `generate` takes them.

    Attributes:
      sampling: The sampling parameters.
      eos_token: The end tokens, possibly none.
    """

    sampling: SamplingParams
    eos_token: tuple[int, ...]


def load_generation_config(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> GenerationConfig:
    """Returns what generation_config.json in the folder `path` says, read as transformers reads it.

    Without `do_sample` decoding is greedy and the sampling parameters of the file are not read; with it, a missing
    `top_k` is 50. A folder without the file is greedy, and its end tokens are `eos_token_id` of config.json.

    Args:
      path: The folder.
      ignore: Settings to leave out, whatever their values.

    Raises:
      ValueError: The file is broken; a value has the wrong type or range; an end token is negative or not in the
        vocabulary of config.json; or a setting that would change the distribution is unknown or not supported, such
        as a repetition penalty. `process_logits_fn` of `generate` can implement such a setting.
    """
    file, config_file = Path(path) / _FILE, Path(path) / "config.json"
    greedy = SamplingParams(temperature=0.0)
    if not file.exists():
        config = read_json(config_file)
        return GenerationConfig(greedy, () if "eos_token_id" in ignore else _end_tokens(config, config_file, config))
    harmless = _HARMLESS.split()
    values = {key: value for key, value in read_json(file).items() if value is not None and key not in ignore}
    for key, value in values.items():
        if key in harmless or key in _SAMPLING or key.startswith("_"):
            continue
        if value is False or value in _NEUTRAL.get(key, ()):
            continue
        what = "is not supported" if key in _NEUTRAL else "is unknown and might change what is sampled"
        raise ValueError(f"{file} holds {key} = {brief(value)}, which {what}; ignore=({key!r},) leaves it out.")
    sampling = SamplingParams(
        **{
            key: read_setting(values, key, kind, source=file, default=default)
            for key, (kind, default) in _SAMPLING.items()
        }
    )
    do_sample = read_setting(values, "do_sample", BOOLEAN, source=file, default=False)
    end_tokens = _end_tokens(values, file, read_json(config_file, required=False))
    return GenerationConfig(sampling if do_sample else greedy, end_tokens)


def _end_tokens(values: Mapping[str, Any], file: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The end tokens in `values`, checked against the vocabulary that `config` states, if it does."""
    listed = values.get("eos_token_id")
    tokens = [] if listed is None else listed if isinstance(listed, list) else [listed]
    source = file.parent / "config.json"
    size = read_setting(config, "vocab_size", whole_number(1), source=source, default=2**31)
    if not all(type(token) is int and 0 <= token < size for token in tokens):
        raise ValueError(
            f"eos_token_id in {file} must be a token or a list of tokens, from 0 to {size - 1}, got {brief(listed)}; "
            "ignore=('eos_token_id',) leaves it out."
        )
    return tuple(tokens)
