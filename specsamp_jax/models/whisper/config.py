"""Sizes of a Whisper model, read from and written to config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

# Settings of config.json that must have these values, because no other is implemented.
_REQUIRED = {
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
    "quantization_config": None,
}


@dataclasses.dataclass(frozen=True)
class WhisperConfig:
    """Sizes of a Whisper, with the names and defaults of Hugging Face's config.json.

    Attributes:
      vocab_size: Tokens.
      num_mel_bins: Mel filters of the features: 80, or 128 in large-v3.
      d_model: Features of both residual streams; even.
      encoder_layers: Blocks of the encoder.
      encoder_attention_heads: Heads of its attention; divides `d_model`.
      encoder_ffn_dim: Features between the matrices of its MLP.
      decoder_layers: Blocks of the decoder; 2 in most distilled checkpoints.
      decoder_attention_heads: Heads of its attentions; divides `d_model`.
      decoder_ffn_dim: Features between the matrices of its MLP.
      max_source_positions: Encoder states of a window; each covers two frames of 10 ms.
      max_target_positions: Length of the longest text, its prompt included.
      median_filter_width: States in the median filter of word times; odd.

    Raises:
      ValueError: Sizes that do not fit together.
    """

    model_type: ClassVar[str] = "whisper"

    vocab_size: int = 51865
    num_mel_bins: int = 80
    d_model: int = 384
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    encoder_ffn_dim: int = 1536
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    max_source_positions: int = 1500
    max_target_positions: int = 448
    median_filter_width: int = 7

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value <= 0:
                raise ValueError(f"{field.name} must be a whole number above 0, got {value!r}.")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"{name} must divide d_model = {self.d_model}, got {getattr(self, name)}.")
        if self.d_model % 2:
            raise ValueError(f"d_model must be even, because its positions are sines and cosines, got {self.d_model}.")

        if self.median_filter_width % 2 == 0:
            raise ValueError(f"median_filter_width must be odd, got {self.median_filter_width}.")

    @property
    def num_frames(self) -> int:
        """Number of frames in a window."""
        return 2 * self.max_source_positions

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of Hugging Face's config.json for this model."""
        return {
            "architectures": ["WhisperForConditionalGeneration"],
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            # generation_config.json has the special tokens; the default of this one is outside small vocabularies.
            "pad_token_id": None,
            **dataclasses.asdict(self),
            **_REQUIRED,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "WhisperConfig":
        """Returns the config that a config.json describes.

        Args:
          values: The parsed file; missing settings have the defaults of transformers.

        Raises:
          ValueError: Another model type, or a setting that is not implemented.
        """
        if values.get("model_type") != cls.model_type:
            raise ValueError(f"model_type must be {cls.model_type!r}, got {values.get('model_type')!r}.")
        for key, required in _REQUIRED.items():
            if values.get(key, required) != required:
                raise ValueError(f"{key} must be {required!r}, got {values[key]!r}; this is not supported.")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: values[name] for name in names if name in values})
