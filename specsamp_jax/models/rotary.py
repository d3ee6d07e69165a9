"""Rotary positions (Su et al., 2021, arXiv 2104.09864) and how models scale them to longer texts."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class _Scaling:
    """Base of the scalings: validation, and their form in config.json."""

    rope_type: ClassVar[str]

    @property
    def amplitude(self) -> float:
        """Multiplies the cosines and sines, and so the queries and keys."""
        return 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} of rope scaling {self.rope_type!r} must be above 0, got {value}.")

    def to_dict(self) -> dict[str, Any]:
        """Returns `rope_scaling` of config.json."""
        return {"rope_type": self.rope_type, **{name: x for name, x in vars(self).items() if x is not None}}


@dataclasses.dataclass(frozen=True)
class LinearScaling(_Scaling):
    """Position interpolation: all angles are divided by `factor` (Chen et al., 2023, arXiv 2306.15595, equation 4).

    Attributes:
      factor: Ratio of the new to the original maximum text length.
    """

    rope_type: ClassVar[str] = "linear"
    factor: float

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        return frequencies / self.factor


@dataclasses.dataclass(frozen=True)
class Llama3Scaling(_Scaling):
    """Llama 3's: slow angles are divided by `factor`, fast ones kept, and those between blended.

    Source: Grattafiori et al., 2024, arXiv 2407.21783, section 3.4.3, and the reference code of Llama 3.1.

    Attributes:
      factor: Divides the angles that turn fewer than `low_freq_factor` times over the original length.
      low_freq_factor: Turns below which an angle is slow.
      high_freq_factor: Turns above which an angle is fast.
      original_max_position_embeddings: The length of the texts trained on before.

    Raises:
      ValueError: `high_freq_factor` is not above `low_freq_factor`.
    """

    rope_type: ClassVar[str] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        super().__post_init__()
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor of rope scaling 'llama3' must be above low_freq_factor = {self.low_freq_factor}, "
                f"got {self.high_freq_factor}."
            )

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        fast = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        fast = np.clip(fast, 0, 1)
        return frequencies * (fast + (1 - fast) / self.factor)


@dataclasses.dataclass(frozen=True)
class YarnScaling(_Scaling):
    """YaRN: slow angles are divided by `factor`, fast ones kept, those between blended, and the attention sharpened.

    Source: Peng et al., 2023, arXiv 2309.00071, section 3.2 to 3.4, with the rounding of its reference code.

    Attributes:
      factor: Ratio of the new to the original maximum text length.
      original_max_position_embeddings: The length of the texts trained on before.
      beta_fast: Turns over the original length above which an angle is fast.
      beta_slow: Turns below which an angle is slow.
      attention_factor: Multiplies the cosines and sines. None: 0.1 log(factor) + 1, or 1 if `factor` is at most 1.

    Raises:
      ValueError: `beta_fast` is not above `beta_slow`.
    """

    rope_type: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not self.beta_fast > self.beta_slow:
            raise ValueError(
                f"beta_fast of rope scaling 'yarn' must be above beta_slow = {self.beta_slow}, got {self.beta_fast}."
            )

    @property
    def amplitude(self) -> float:
        """`attention_factor`, or its default."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """Returns the scaled frequencies."""
        count = len(frequencies)
        if count == 1:
            return frequencies
        # Frequencies are a geometric sequence from 1 on: the index of an angle that turns a number of times.
        step = -math.log(frequencies[1])
        fastest, slowest = (
            math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / step
            for turns in (self.beta_fast, self.beta_slow)
        )
        low, high = max(math.floor(fastest), 0), min(math.ceil(slowest), 2 * count - 1)
        slow = np.clip((np.arange(count) - low) / max(high - low, 0.001), 0, 1)
        return frequencies * (1 - slow + slow / self.factor)


Scaling = LinearScaling | Llama3Scaling | YarnScaling
_SCALINGS: dict[str, Any] = {scaling.rope_type: scaling for scaling in (LinearScaling, Llama3Scaling, YarnScaling)}


def read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `rope_theta` (if present) and `rope_scaling` of a parsed config.json of transformers 4 or 5.

    Both are top-level settings, or fields of `rope_parameters`, as transformers 5 writes them.

    Raises:
      ValueError: A scaling that is not implemented, or settings of it that are unknown or missing.
    """
    scaling, parameters = values.get("rope_scaling"), values.get("rope_parameters")
    if scaling and parameters:
        raise ValueError(
            f"The config must hold one of rope_scaling and rope_parameters, got {scaling!r} and {parameters!r}."
        )
    settings = scaling or parameters or {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"rope_scaling must be a JSON object, got {settings!r}.")
    settings = dict(settings)
    theta = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    theta |= {"rope_theta": settings.pop("rope_theta")} if "rope_theta" in settings else {}
    kinds = {settings.pop(key) for key in ("rope_type", "type") if key in settings} or {"default"}
    kind = kinds.pop()
    if kinds or kind not in ("default", *_SCALINGS):
        supported = ", ".join(map(repr, ("default", *_SCALINGS)))
        raise ValueError(f"rope_type must be one of {supported}, got {kind!r}; other scalings are not supported.")
    fields, required = {}, []
    if kind != "default":
        declared = dataclasses.fields(_SCALINGS[kind])
        fields = {field.name: int if field.type is int else float for field in declared}
        required = [field.name for field in declared if field.default is dataclasses.MISSING]
        settings = {key: value for key, value in settings.items() if value is not None or key in required}
    if kind == YarnScaling.rope_type:
        settings.pop("finetuned", None)  # a note in the first published ones
        if "max_position_embeddings" in values:  # as in transformers
            settings.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if unknown := sorted(settings.keys() - fields.keys()):
        raise ValueError(f"rope scaling {kind!r} must not hold {', '.join(unknown)}, got {settings!r}.")
    if missing := [name for name in required if name not in settings]:
        raise ValueError(f"rope scaling {kind!r} must hold {', '.join(missing)}, got {settings!r}.")
    for key, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} of rope scaling {kind!r} must be a number, got {value!r}.")
        settings[key] = fields[key](value)
    return {**theta, "rope_scaling": None if kind == "default" else _SCALINGS[kind](**settings)}


def rotary_angles(
    positions: Int[Array, "B T"], head_dim: int, theta: float, scaling: Scaling | None = None
) -> tuple[Float[Array, "B T 1 H"], Float[Array, "B T 1 H"]]:
    """Returns the cosine and sine of each position's angles, float32, to be used by all heads of all layers.

    Angle i of `head_dim / 2` turns by `theta^(-2 i / head_dim)` per position (equation 15), before any scaling. Both
    are multiplied by the `amplitude` of the scaling.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    frequencies = frequencies if scaling is None else scaling(frequencies)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.astype(np.float32)
    if scaling is None or scaling.amplitude == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scaling.amplitude, jnp.sin(angles) * scaling.amplitude


def rotate(
    x: Float[Array, "B T N D"], cosine: Float[Array, "B T 1 H"], sine: Float[Array, "B T 1 H"]
) -> Float[Array, "B T N D"]:
    """Returns `x` with feature pairs (i, i + D/2) turned by their angles, the Hugging Face convention."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x.dtype)
