"""The config of a model in a GGUF file, as the config.json that it was converted from would state it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from specsamp_jax._files import TEXT, brief, number, whole_number
from specsamp_jax._gguf import Header
from specsamp_jax.models.checkpoints.gguf_tensors import locate
from specsamp_jax.models.rotary import Llama3Scaling

MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}
"""`model_type` of config.json by `general.architecture`. Mistral has the architecture llama."""

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_OPTIONAL = {"attention.sliding_window": "sliding_window"}
_NUMBERS = {
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_ROPE = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
# Read elsewhere here, or without effect on the logits of these architectures.
_OTHER = (
    "vocab_size attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length attention.value_length "
    "rope.dimension_count rope.scaling.type rope.scaling.finetuned attention.sliding_window_pattern tensor_data_layout"
)
_CONTROL = 3  # type of a token
# Ends of a text or a turn that older files do not state, by the names of the families' special tokens.
_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
)
_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0  # of all published Llama 3.1 to 3.3
# Layers of the largest Gemma 2 and Gemma 3, which scale scores by the features per head of the residual stream.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of divisors of the rotary frequencies, which Llama 3.1 and later have."""


def read_config(header: Header) -> dict[str, Any]:
    """Returns the settings of config.json for the model in a GGUF file.

    Raises:
      ValueError: The architecture is not supported, a size is missing or of another type, or the file states something
        that these models do not have.
    """
    architecture = header.setting("general.architecture", TEXT)
    if architecture not in MODEL_TYPES or header.metadata.get("general.type", "model") != "model":
        kinds = ", ".join(map(repr, MODEL_TYPES))
        raise ValueError(
            f"general.architecture must be one of {kinds} in a GGUF file of general.type 'model', got "
            f"{brief(architecture)} and {brief(header.metadata.get('general.type'))} in {header.path}."
        )
    prefix = f"{architecture}."
    stated = {key.removeprefix(prefix): value for key, value in header.metadata.items() if key.startswith(prefix)}
    _check_unknown(header, stated, architecture)
    size = whole_number(1)
    config: dict[str, Any] = {"model_type": MODEL_TYPES[architecture]}
    for names, kind in ((_SIZES | _OPTIONAL, size), (_NUMBERS, number(0))):
        for key, name in names.items():
            if (value := header.setting(prefix + key, kind)) is not None:
                config[name] = value
            elif key in _SIZES:
                raise ValueError(f"{header.path} must hold {prefix}{key}, which is missing.")
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = header.setting(f"{prefix}attention.head_count_kv", size, heads)
    epsilon = header.setting(f"{prefix}attention.layer_norm_rms_epsilon", number(0))
    if epsilon is not None:
        config["rms_norm_eps"] = float(f"{epsilon:.7g}")  # as it was before it was float32: 1e-06, not 9.99999997e-07
    config["head_dim"] = _head_dim(header, prefix, config["hidden_size"] // heads)
    config["vocab_size"] = _vocab_size(header)
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["eos_token_id"] = _end_tokens(header)
    if architecture in _LARGEST_GEMMA:
        largest = config["num_hidden_layers"] == _LARGEST_GEMMA[architecture]
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if largest else config["head_dim"]
    if config["model_type"] not in ("gemma2", "gemma3_text"):
        _drop_wide_window(header, config)
    else:
        _read_pattern(header, f"{prefix}attention.sliding_window_pattern", config)
    scaling = _read_scaling(header, prefix, config["max_position_embeddings"])
    if ROPE_FACTORS in header.tensors:
        scaling = _llama3_scaling(header, scaling, config.get("rope_theta", 10_000.0))
    return config if scaling is None else {**config, "rope_scaling": scaling}


def _check_unknown(header: Header, stated: Mapping[str, Any], architecture: str) -> None:
    known = {*_SIZES, *_OPTIONAL, *_NUMBERS, *_ROPE, *_OTHER.split()}
    for key, value in stated.items():
        off = not np.any(value) if not isinstance(value, str | list) else not value
        if key not in known and not off:
            raise ValueError(
                f"{header.path} holds {architecture}.{key} = {brief(value)}, which is not known here and might change "
                "what the model computes."
            )


def _head_dim(header: Header, prefix: str, default: int) -> int:
    size = whole_number(1)
    head_dim = header.setting(f"{prefix}attention.key_length", size, default)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := header.setting(prefix + key, size, head_dim)) != head_dim:
            raise ValueError(
                f"{prefix}{key} in {header.path} must be {head_dim}, as the size of a key, got {other}; this is not "
                "supported."
            )
    return head_dim


def _vocab_size(header: Header) -> int:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path} must hold the matrix token_embd.weight, which is missing.")
    return embedding.shape[0]


def _end_tokens(header: Header) -> list[int]:
    """Tokens that end a text or a turn: those that the file states, and special tokens with well-known names."""
    stated = (header.setting(f"tokenizer.ggml.{name}_token_id", whole_number(0)) for name in ("eos", "eot", "eom"))
    tokens, types = (header.metadata.get(f"tokenizer.ggml.{name}", ()) for name in ("tokens", "token_type"))
    named = [
        i for i, (token, kind) in enumerate(zip(tokens, types, strict=False)) if kind == _CONTROL and token in _ENDS
    ]
    return list(dict.fromkeys([*(token for token in stated if token is not None), *named]))


def _drop_wide_window(header: Header, config: dict[str, Any]) -> None:
    """Removes a sliding window of these families if no text is longer."""
    window = config.pop("sliding_window", None)
    if window is not None and window < config["max_position_embeddings"]:
        raise ValueError(
            f"{header.path} states a sliding window of {window} tokens, which is not supported for "
            f"{config['model_type']!r}."
        )


def _read_pattern(header: Header, key: str, config: dict[str, Any]) -> None:
    """Reads which layers have a window: true for those, or the distance of layers without."""
    pattern = header.metadata.get(key)
    if isinstance(pattern, np.ndarray) and pattern.dtype == bool:
        config["layer_types"] = ["sliding_attention" if slides else "full_attention" for slides in pattern.tolist()]
    elif pattern is not None:
        distance = 2 if config["model_type"] == "gemma2" else 6
        if type(pattern) is not int or pattern != distance:
            raise ValueError(f"{key} in {header.path} must be {distance} or a list of booleans, got {brief(pattern)}.")


def _read_scaling(header: Header, prefix: str, max_length: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; None for no scaling."""
    kind = header.setting(f"{prefix}rope.scaling.type", TEXT, "none")
    if kind == "none":
        return None
    values = {name: header.setting(prefix + key, number(0)) for key, name in _ROPE.items()}
    if kind == "yarn":
        values["original_max_position_embeddings"] = values["original_max_position_embeddings"] or max_length
        return {"rope_type": kind, **{name: value for name, value in values.items() if value is not None}}
    # Other types are refused with the settings of config.json.
    return {"rope_type": kind, "factor": values["factor"]}


def _llama3_scaling(header: Header, scaling: dict[str, Any] | None, theta: float) -> dict[str, Any] | None:
    """The scaling of type llama3 whose divisors are in the file.

    The converter to GGUF writes them in place of the settings from which it computes them.
    """
    tensor = header.tensors[ROPE_FACTORS]
    with locate(header, ROPE_FACTORS, tensor).mapped() as rows:
        factors = rows[:] if len(tensor.shape) == 1 else np.zeros(1)
    if scaling is None and np.all(factors == 1):
        return None
    factor = float(factors.max())
    if scaling is None and np.isfinite(factors).all() and factor > 1 and theta > 0:
        frequencies = theta ** (-np.arange(len(factors)) / len(factors))
        found = Llama3Scaling(factor, _LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_LENGTH)
        if np.allclose(frequencies / found(frequencies), factors, rtol=1e-4, atol=0):
            return found.to_dict()
    raise ValueError(
        f"{ROPE_FACTORS} in {header.path} must hold the divisors of Llama 3's rope scaling, and holds others; this is "
        "not supported."
    )
