"""What the configs of decoder-only families share: their sizes, and how config.json is read and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from specsamp_jax.models.rotary import Scaling, read_rope

# Settings that change no logit: names, versions, special tokens, what only training or sampling reads, and the type
# of the weights, which the weights say themselves.
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


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a decoder-only transformer, under the names of Hugging Face's config.json.

    Attributes:
      vocab_size: Tokens.
      hidden_size: Features of the residual stream.
      intermediate_size: Features between the matrices of the MLP.
      num_hidden_layers: Blocks.
      num_attention_heads: Heads of queries.
      num_key_value_heads: Heads of keys and values; divides `num_attention_heads`.
      head_dim: Features of a head, even. None: `hidden_size / num_attention_heads`.
      rope_theta: Base of the rotary frequencies.
      rms_norm_eps: Added to the mean square in each norm.
      tie_word_embeddings: Whether the head is the embedding, transposed.
      max_position_embeddings: The longest text trained on; recorded, not enforced.
      rope_scaling: How the rotary frequencies are scaled; None: they are not.

    Raises:
      ValueError: Sizes that do not fit together.
    """

    model_type: ClassVar[str]
    architecture: ClassVar[str]
    required: ClassVar[Mapping[str, tuple[Any, ...]]]
    """What config.json may say only in one of these ways, the first being what is written."""
    unused: ClassVar[frozenset[str]] = frozenset()
    """Settings that do nothing as long as `required` is kept."""

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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{field.name} must be above 0, got {value}.")
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

    @property
    def head_size(self) -> int:
        """`head_dim`, or what stands for it."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many tokens each layer attends, itself included; None: all before it."""
        return (None,) * self.num_hidden_layers

    def to_dict(self) -> dict[str, Any]:
        """Returns what Hugging Face's config.json holds for this model."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            **dataclasses.asdict(self),
            "head_dim": self.head_size,
            "rope_scaling": None if self.rope_scaling is None else self.rope_scaling.to_dict(),
            **{key: allowed[0] for key, allowed in self.required.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]):
        """Returns the config that a config.json describes.

        Args:
          values: The parsed file, of transformers 5 (`rope_parameters`, `dtype`) or older (`rope_theta`,
            `rope_scaling`, `torch_dtype`). What it leaves out is what transformers takes for it.

        Raises:
          ValueError: Another model type, a missing size, or a setting that is not implemented or not known.
        """
        if values.get("model_type") != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r}, got {values.get('model_type')!r}.")
        for key, allowed in cls.required.items():
            if key in values and values[key] not in allowed:
                raise ValueError(f"{key} must be {allowed[0]!r}, got {values[key]!r}; this is not supported.")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        layers = values.get("layer_types") or ["full_attention"]
        if "layer_types" not in fields and set(layers) != {"full_attention"}:
            raise ValueError(f"layer_types must be 'full_attention' only, got {layers!r}; this is not supported.")
        known = {*fields, *cls.required, *cls.unused, *_HARMLESS.split(), "layer_types", "rope_parameters"}
        for key, value in values.items():
            # What is off changes nothing, whatever it is.
            if key not in known and not key.startswith("_") and value is not None and value is not False:
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
    """JSON's value as Python's, checked: a list as a tuple, and 1 as 1.0 where a number is meant."""
    allowed, words = _KINDS.get(kind, (object, ""))
    if not isinstance(value, allowed) or (isinstance(value, bool) and words and kind is not bool):
        raise ValueError(f"{key} must be {words}, got {value!r}.")
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, int) and kind in (float, float | None) else value
