"""What a wrong argument is told: its name, what was expected, what came, and the likely cause."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer

from specsamp_jax._types import Draft, Model, SamplingParams


def _shape(array: Any) -> str:
    return f"{jnp.result_type(array).name}{list(jnp.shape(array))}"


def _concrete(value: Any) -> np.ndarray | None:
    """The value as NumPy sees it, or None where it is known only when the compiled program runs."""
    return None if isinstance(value, Tracer) else np.asarray(value)


def key(key: Any, batch_size: int) -> None:
    """One typed threefry key, or one a row."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, dtypes.prng_key)):
        raise ValueError(
            f"key must be a typed key, as jax.random.key makes it; got {type(key).__name__}. "
            "Keys of jax.random.PRNGKey are wrapped by jax.random.wrap_key_data."
        )
    if str(jax.random.key_impl(key)) != "threefry2x32":
        raise ValueError(
            f"key must be of the threefry2x32 implementation; got {jax.random.key_impl(key)}. The others draw "
            "different bits in another batch, so a row would depend on its neighbours."
        )
    if key.shape not in ((), (batch_size,)):
        raise ValueError(
            f"key must be one key, or one a row with shape [B] = [{batch_size}]; got shape {list(key.shape)}."
        )


def floating(name: str, array: Any) -> None:
    """Logits are of a floating-point type."""
    if not jnp.issubdtype(jnp.result_type(array), jnp.floating):
        raise ValueError(f"{name} must be of a floating-point type; got {_shape(array)}. Are they token ids?")


def logits(name: str, array: Any, letters: str) -> None:
    """Floating-point logits with one axis a letter, the vocabulary last and not empty."""
    floating(name, array)
    if jnp.ndim(array) != len(letters.split()):
        raise ValueError(f"{name} must have shape [{', '.join(letters.split())}]; got {_shape(array)}.")
    if jnp.shape(array)[-1] == 0:
        raise ValueError(f"{name} must hold at least one token on its last axis; got {_shape(array)}.")


def sampling(name: str, params: SamplingParams, batch_size: int) -> None:
    """Each field a scalar or `[B]`, in its range where its values are known before the program runs."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"{name} must be a SamplingParams; got {type(params).__name__}.")
    for field, value in params._asdict().items():
        if jnp.shape(value) not in ((), (batch_size,)):
            raise ValueError(
                f"{name}.{field} must be a scalar or have one value a row, [B] = [{batch_size}]; got {_shape(value)}."
            )
    ranges = {
        "temperature": (0.0, np.inf, "0 is greedy"),
        "top_k": (0, np.inf, "0 is off"),
        "top_p": (0.0, 1.0, "1 is off"),
        "min_p": (0.0, 1.0, "0 is off"),
    }
    if not jnp.issubdtype(jnp.result_type(params.top_k), jnp.integer):
        raise ValueError(f"{name}.top_k must be a whole number; got {_shape(params.top_k)}.")
    for field, (low, high, off) in ranges.items():
        value = _concrete(getattr(params, field))
        if value is not None and not np.all((value >= low) & (value <= high)):
            raise ValueError(f"{name}.{field} must be in [{low:g}, {high:g}] ({off}); got {value}.")


def draft(draft: Draft, target_logits: Any) -> None:
    """A draft that fits the target's logits `[B, K+1, V]`."""
    if not isinstance(draft, Draft):
        raise ValueError(f"draft must be a Draft; got {type(draft).__name__}. Draft(tokens) is the shortest.")
    batch_size, num_rows, vocab_size = jnp.shape(target_logits)
    tokens = draft.tokens
    if not jnp.issubdtype(jnp.result_type(tokens), jnp.signedinteger):
        raise ValueError(f"draft.tokens must be of a signed integer type, for -1 ends a draft; got {_shape(tokens)}.")
    if jnp.shape(tokens) != (batch_size, num_rows - 1):
        raise ValueError(
            f"draft.tokens must have shape [B, K] = [{batch_size}, {num_rows - 1}] beside target_logits [B, K+1, V] = "
            f"{[batch_size, num_rows, vocab_size]}; got {_shape(tokens)}. "
            "Is the target's row for the bonus token missing?"
        )
    expected = (batch_size, num_rows - 1, vocab_size)
    if draft.logits is not None:
        floating("draft.logits", draft.logits)
        if jnp.shape(draft.logits) != expected:
            raise ValueError(
                f"draft.logits must have shape [B, K, V] = {list(expected)}; got {_shape(draft.logits)}. "
                "Both models must share one vocabulary: pad the shorter logits with -inf."
            )
    if draft.sampling is not None:
        if draft.logits is None:
            raise ValueError("draft.sampling says what was applied to draft.logits, and there are none: leave it None.")
        sampling("draft.sampling", draft.sampling, batch_size)
    if draft.log_normalizers is not None:
        if draft.logits is None:
            raise ValueError("draft.log_normalizers are those of draft.logits, and there are none: leave it None.")
        if jnp.shape(draft.log_normalizers) != expected[:2]:
            raise ValueError(
                f"draft.log_normalizers must have shape [B, K] = {list(expected[:2])}; "
                f"got {_shape(draft.log_normalizers)}."
            )


def implementation(name: str | None) -> None:
    """None, or the name of an implementation."""
    if name not in (None, "xla", "pallas"):
        raise ValueError(f'implementation must be None, "xla" or "pallas"; got {name!r}.')


def pair(target_logits: Any, draft_logits: Any) -> None:
    """Logits of one shape `[..., V]` from target and draft."""
    floating("target_logits", target_logits)
    floating("draft_logits", draft_logits)
    if jnp.shape(target_logits) != jnp.shape(draft_logits) or not jnp.shape(target_logits):
        raise ValueError(
            f"target_logits and draft_logits must have one shape [..., V]; got {_shape(target_logits)} and "
            f"{_shape(draft_logits)}. Is the target's bonus row among them?"
        )


def generate(prompt: Any, target: Any, draft: Any, num_draft: Any, max_new_tokens: Any, prompt_lengths: Any) -> None:
    """The arguments of the decoding loop, the keys and the sampling parameters excepted."""
    if jnp.ndim(prompt) != 2 or not jnp.issubdtype(jnp.result_type(prompt), jnp.integer) or prompt.shape[1] == 0:
        raise ValueError(
            f"prompt must be token ids of shape [B, P], at least one a row; got {_shape(prompt)}. "
            "A single prompt is [1, P]."
        )
    if not isinstance(target, Model):
        raise ValueError(f"target must be a Model; got {type(target).__name__}. See specsamp_jax.models for adapters.")
    if not (draft is None or isinstance(draft, Model) or hasattr(draft, "propose")):
        raise ValueError(f"draft must be a Model, a drafter with `propose`, or None; got {type(draft).__name__}.")
    if isinstance(num_draft, int) and num_draft < 0:
        raise ValueError(f"num_draft must be at least 0; got {num_draft}.")
    if not isinstance(num_draft, int) and not hasattr(num_draft, "lengths"):
        raise ValueError(
            f"num_draft must be a Python int or HeuristicNumDraft, for it sets shapes; got {type(num_draft).__name__}."
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be a Python int of at least 1; got {max_new_tokens!r}.")
    if prompt_lengths is None:
        return
    if jnp.shape(prompt_lengths) != (prompt.shape[0],):
        raise ValueError(f"prompt_lengths must have shape [B] = [{prompt.shape[0]}]; got {_shape(prompt_lengths)}.")
    lengths = _concrete(prompt_lengths)
    if lengths is not None and not np.all((lengths >= 1) & (lengths <= prompt.shape[1])):
        raise ValueError(f"prompt_lengths must be from 1 to P = {prompt.shape[1]}; got {lengths}.")
