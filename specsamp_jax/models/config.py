"""Sizes of a decoder-only transformer, read from and written to config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from specsamp_jax.models.families import FAMILIES, Family
from specsamp_jax.models.rotary import Scaling, read_rope

# Settings that change no logit: names, versions, special tokens, settings of training and sampling, and the dtype of
# the weights, which the tensors have themselves.
_HARMLESS = (
    "architectures auto_map model_type transformers_version torch_dtype dtype initializer_range attention_dropout "
    "hidden_dropout embd_pdrop resid_pdrop use_cache cache_implementation bos_token_id eos_token_id pad_token_id "
    "sep_token_id decoder_start_token_id pretraining_tp max_sequence_length output_attentions output_hidden_states "
    "return_dict torchscript use_bfloat16 id2label label2id problem_type task_specific_params tokenizer_class prefix "
    "finetuning_task chunk_size_feed_forward do_sample temperature top_k top_p typical_p min_length max_length "
    "num_beams num_beam_groups num_return_sequences diversity_penalty length_penalty repetition_penalty "
    "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids forced_bos_token_id forced_eos_token_id "
    "suppress_tokens begin_suppress_tokens exponential_decay_length_penalty early_stopping remove_invalid_values "
    "output_scores return_dict_in_generate"
)


_FULL, _SLIDING = "full_attention", "sliding_attention"
# Fields of DecoderConfig that only some families have; Family.settings says which.
_OPTIONAL = (
    "sliding_window",
    "layer_types",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder-only transformer, named as in Hugging Face's config.json.

    Each family has a subclass with its `model_type` and its defaults. The last six fields exist in some families
    only; in the others they must be None.

    Attributes:
      vocab_size: Tokens in the vocabulary.
      hidden_size: Features of the residual stream.
      intermediate_size: Features between the matrices of the MLP.
      num_hidden_layers: Blocks.
      num_attention_heads: Query heads.
      num_key_value_heads: Key and value heads; divides `num_attention_heads`.
      head_dim: Features of a head, even. None: `hidden_size / num_attention_heads`.
      rope_theta: Base of the rotary frequencies.
      rms_norm_eps: Added to the mean square in each norm.
      tie_word_embeddings: Whether the head is the transposed embedding.
      max_position_embeddings: Length of the longest text in training; recorded, not enforced.
      rope_scaling: Scaling of the rotary frequencies; None: no scaling.
      sliding_window: Tokens that a layer with a window attends, itself included. None: all tokens before it.
      layer_types: "sliding_attention" or "full_attention" for each layer. None: the family's pattern.
      rope_local_base_freq: Base of the rotary frequencies, unscaled, in layers with a window. None: as in other layers.
      query_pre_attn_scalar: Scores are divided by its square root. None: by that of `head_dim`.
      attn_logit_softcapping: Soft cap of the attention scores. None: no cap.
      final_logit_softcapping: Soft cap of the logits. None: no cap.

    Raises:
      ValueError: Sizes that do not fit together, or a setting that the family does not have.
    """

    model_type: ClassVar[str]

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    rope_scaling: Scaling | None = None
    _: dataclasses.KW_ONLY
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    rope_local_base_freq: float | None = None
    query_pre_attn_scalar: int | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}.")
            if name in _OPTIONAL and name not in self.family.settings and value is not None:
                raise ValueError(f"{name} must be None, for {self.model_type!r} does not have it, got {value!r}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads = {self.num_attention_heads}, "
                f"got {self.num_key_value_heads}."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"head_dim must be given where num_attention_heads = {self.num_attention_heads} does not divide "
                f"hidden_size = {self.hidden_size}."
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim must be even, for rotary positions turn pairs, got {self.head_size}.")
        types = self.layer_types
        if types is not None and not (len(types) == self.num_hidden_layers and set(types) <= {_FULL, _SLIDING}):
            raise ValueError(
                f"layer_types must be one of {_FULL} and {_SLIDING} for each of {self.num_hidden_layers} layers, "
                f"got {types!r}."
            )

    @property
    def family(self) -> Family:
        """Architecture of the family."""
        return FAMILIES[self.model_type]

    @property
    def head_size(self) -> int:
        """`head_dim`, or its default."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Number of tokens that each layer attends, itself included; None: all tokens before it."""
        return tuple(self.sliding_window if kind == _SLIDING else None for kind in self._layer_kinds())

    @property
    def ropes(self) -> tuple[tuple[float, Scaling | None], ...]:
        """Base of the rotary frequencies, and their scaling, for each layer."""
        everywhere = self.rope_theta, self.rope_scaling
        local = everywhere if self.rope_local_base_freq is None else (self.rope_local_base_freq, None)
        return tuple(local if kind == _SLIDING else everywhere for kind in self._layer_kinds())

    def _layer_kinds(self) -> list[str]:
        types = self.layer_types or self.family.layer_types
        return [types[i % len(types)] for i in range(self.num_hidden_layers)]

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of Hugging Face's config.json for this model."""
        fields = dataclasses.asdict(self)
        absent = set(_OPTIONAL) - self.family.settings
        return {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
            **{name: value for name, value in fields.items() if name not in absent},
            "head_dim": self.head_size,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict(),
            **{key: allowed[0] for key, allowed in self.family.required.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Returns the config that a config.json describes.

        Args:
          values: The parsed file, of transformers 5 (`rope_parameters`, `dtype`) or older (`rope_theta`,
            `rope_scaling`, `torch_dtype`). Missing settings have the defaults of transformers.

        Raises:
          ValueError: Another model type, a missing size, or a setting that is unknown or not implemented.
        """
        if values.get("model_type") != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r}, got {values.get('model_type')!r}.")
        family = FAMILIES[cls.model_type]
        for key, allowed in family.required.items():
            if key in values and values[key] not in allowed:
                raise ValueError(f"{key} must be {allowed[0]!r}, got {values[key]!r}; this is not supported.")
        absent = set(_OPTIONAL) - family.settings
        fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in absent}
        layers = values.get("layer_types") or [_FULL]
        if "layer_types" not in fields and set(layers) != {_FULL}:
            raise ValueError(f"layer_types must be {_FULL!r} only, got {layers!r}; this is not supported.")
        supported = {*fields, *family.required, *family.ignored, *_HARMLESS.split(), "layer_types", "rope_parameters"}
        for key, value in values.items():
            # A setting that is null or false is off and changes nothing.
            if key not in supported and not key.startswith("_") and value is not None and value is not False:
                raise ValueError(
                    f"config.json holds {key} = {value!r}, which is not known here for {cls.model_type!r} and might "
                    "change what the model computes; where it does not, take it out."
                )
        flat = {key: value for key, value in values.items() if key in fields} | read_rope(values)
        missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in flat]
        if missing == ["num_key_value_heads"]:  # config.json of the first Llama: as many as query heads
            flat["num_key_value_heads"] = flat["num_attention_heads"]
        elif missing:
            raise ValueError(f"The config must hold {', '.join(missing)}, which it does not.")
        if flat["num_key_value_heads"] is None:
            flat["num_key_value_heads"] = flat["num_attention_heads"]
        return cls(**{key: _plain(key, value, fields[key].type) for key, value in flat.items()})


_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "an integer"),
    int | None: (int | None, "an integer or null"),
    float: (int | float, "a number"),
    float | None: (int | float | None, "a number or null"),
}


def _plain(key: str, value: Any, kind: Any) -> Any:
    """Returns a JSON value, checked, as its Python type: lists as tuples, and integers as floats for float fields."""
    allowed, words = _KINDS.get(kind, (object, ""))
    if not isinstance(value, allowed) or (isinstance(value, bool) and words and kind is not bool):
        raise ValueError(f"{key} must be {words}, got {value!r}.")
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, int) and kind in (float, float | None) else value
