"""Argument validation: each error names the argument, the expected and the actual value, and the likely cause.

Values are checked if they are concrete. Traced values cannot be checked; for them the functions document a result
instead.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.core import Tracer

from specsamp_jax._types import Draft, SamplingParams

_ARRAYS = (jax.Array, np.ndarray, np.generic)
Size = Any
"""A size: an int, or a symbolic dimension of `jax.export`."""

LARGEST = 2**31 - 1
"""The largest int32, in which token ids and counts are kept."""


# Values and arrays of one kind


def _describe(value: Any) -> str:
    """Formats a value for an error message: arrays as dtype and shape, numbers as they are, others as type name."""
    if isinstance(value, bool | int | float | complex):
        return repr(value)
    if not isinstance(value, _ARRAYS):
        return type(value).__name__
    name = value.dtype.name if _is_foreign(value) else jnp.result_type(value).name
    return f"{name}{list(value.shape)}"


def _concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array; None if it is traced, or sharded over other processes."""
    if isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(value)


def _is_foreign(value: Any) -> bool:
    """Whether an array is of a type that JAX does not have: records, texts, objects, dates, floats of over 64 bits."""
    dtype, numpy = value.dtype, not isinstance(value, jax.Array)
    return numpy and (dtype.kind in "OSUMm" or dtype.names is not None or (dtype.kind == "f" and dtype.itemsize > 8))


def _is(kind: Any, value: Any) -> bool:
    return not _is_foreign(value) and jnp.issubdtype(value.dtype, kind)


def array(name: str, value: Any) -> None:
    """A JAX or NumPy array."""
    if not isinstance(value, _ARRAYS):
        raise ValueError(f"{name} must be a JAX or NumPy array; got {_describe(value)}. jnp.asarray makes one.")


def floating(name: str, value: Any, hint: str = "Are they token ids?") -> None:
    """An array of a floating-point type."""
    array(name, value)
    if not _is(jnp.floating, value):
        raise ValueError(f"{name} must be of a floating-point type; got {_describe(value)}. {hint}")


def integers(name: str, value: Any) -> None:
    """An array of integers."""
    array(name, value)
    if not _is(jnp.integer, value):
        raise ValueError(f"{name} must be of an integer type; got {_describe(value)}.")


def count(name: str, value: Any, lowest: int) -> None:
    """A Python int of at least `lowest`, static because shapes depend on it."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} must be a Python int of at least {lowest}; got {_describe(value)}.")
    if value < lowest:
        raise ValueError(f"{name} must be at least {lowest}; got {value}.")
    if value > LARGEST:
        raise ValueError(f"{name} must be below 2**31; got {value}.")


def is_number(value: Any) -> bool:
    """Whether a value is a Python number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(name: str, value: Any, shape: str = "") -> None:
    """A number that is no bool, or an array of numbers; `shape` describes that of the array in the error."""
    is_array = isinstance(value, _ARRAYS) and (_is(jnp.integer, value) or _is(jnp.floating, value))
    if not is_number(value) and not is_array:
        raise ValueError(f"{name} must be a number, or an array of numbers{shape}; got {_describe(value)}.")


def _number(name: str, value: Any, batch_size: Size) -> None:
    """A number that is no bool, or an array of numbers with shape [] or [B]."""
    numbers(name, value, " with shape [B]")
    if np.shape(value) not in ((), (batch_size,)):
        raise ValueError(
            f"{name} must be a scalar or have one value per row, [B] = [{batch_size}]; got {_describe(value)}."
        )


def at_most(name: str, value: Any, high: int | float, off: str) -> None:
    """Values from 0 to `high`, if they are concrete. `off` explains 0 or `high` in the error."""
    concrete = _concrete(value)
    if concrete is not None and not np.all((concrete >= 0) & (concrete <= high)):
        raise ValueError(f"{name} must be in [0, {high:.10g}] ({off}); got {concrete}.")


def real(name: str, value: Any, batch_size: Size, high: int | float, off: str) -> None:
    """A number from 0 to `high`, or an array of them with shape [] or [B]. `off` explains 0 or `high` in the error."""
    _number(name, value, batch_size)
    # JAX converts a Python int to int32.
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{name} must be below 2**31 where it is a Python int; got {value}. Is it meant as a float?")
    at_most(name, value, high, off)


def whole(name: str, value: Any, batch_size: Size, off: str) -> None:
    """A whole number from 0 to 2**31 - 1, or an array of them with shape [] or [B]. `off` explains 0 in the error."""
    _number(name, value, batch_size)
    if isinstance(value, float) or (isinstance(value, _ARRAYS) and not _is(jnp.integer, value)):
        raise ValueError(f"{name} must be a whole number; got {_describe(value)}.")
    at_most(name, value, LARGEST, off)


def token_ids(name: str, value: Any, vocab_size: int) -> None:
    """Integers from 0 to V - 1, in an array of any shape."""
    integers(name, value)
    concrete = _concrete(value)
    if concrete is None:
        return
    wrong = concrete[(concrete < 0) | (concrete >= vocab_size)]
    if wrong.size:
        raise ValueError(
            f"{name} must hold token ids from 0 to V - 1 = {vocab_size - 1}, the target's vocabulary; got {wrong[0]}. "
            "Does the tokenizer belong to this model?"
        )


def int32(tokens: Any) -> jax.Array:
    """Token ids as int32. Ids beyond int32 are clipped to it, which no vocabulary contains."""
    if tokens.dtype.itemsize > 4 or tokens.dtype == np.uint32:
        lowest = max(jnp.iinfo(tokens.dtype).min, -LARGEST)
        # JAX would cut NumPy's 64 bits to 32 before it clips them.
        numpy = isinstance(tokens, np.ndarray | np.generic)
        tokens = np.clip(np.asarray(tokens), lowest, LARGEST) if numpy else jnp.clip(tokens, lowest, LARGEST)
    return jnp.asarray(tokens.astype(np.int32))


# Arguments of sampling and verification


def key(key: Any, batch_size: Size) -> None:
    """One JAX key or one per row: typed, of any implementation, or the raw words of one."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, dtypes.prng_key)
    raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == np.uint32 and key.ndim > 0
    if not typed and not (raw and key.shape[-1] in (2, 4)):
        raise ValueError(
            "key must be a JAX key, as jax.random.key or jax.random.PRNGKey makes it, or one of them per row; "
            f"got {_describe(key)}."
        )
    shape = key.shape if typed else key.shape[:-1]
    if shape not in ((), (batch_size,)):
        raise ValueError(
            f"key must be one key, or one per row with shape [B] = [{batch_size}]; got shape {list(shape)}."
        )


def logits(name: str, array: Any, letters: str) -> None:
    """Floating-point logits with one axis per name in `letters`; the last axis is the vocabulary, not empty."""
    floating(name, array)
    if array.ndim != len(letters.split()):
        raise ValueError(f"{name} must have shape [{', '.join(letters.split())}]; got {_describe(array)}.")
    _holds_tokens(name, array)


def _holds_tokens(name: str, logits: Any) -> None:
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must hold at least one token on its last axis; got {_describe(logits)}.")


def sampling(name: str, params: SamplingParams, batch_size: Size) -> None:
    """Each field a scalar or `[B]`; concrete values in their range."""
    if not isinstance(params, SamplingParams):
        raise ValueError(f"{name} must be a SamplingParams; got {type(params).__name__}.")
    real(f"{name}.temperature", params.temperature, batch_size, np.inf, "0 is greedy")
    whole(f"{name}.top_k", params.top_k, batch_size, "0 is off")
    real(f"{name}.top_p", params.top_p, batch_size, 1, "1 is off")
    real(f"{name}.min_p", params.min_p, batch_size, 1, "0 is off")


def draft(draft: Draft, target_logits: Any) -> None:
    """A draft that fits the target's logits `[B, K+1, V]`."""
    if not isinstance(draft, Draft):
        raise ValueError(
            f"draft must be a Draft; got {type(draft).__name__}. For a deterministic drafter, Draft(tokens) is enough."
        )
    batch_size, num_rows, vocab_size = target_logits.shape
    tokens = draft.tokens
    array("draft.tokens", tokens)
    if not _is(jnp.signedinteger, tokens):
        raise ValueError(
            f"draft.tokens must be of a signed integer type, because -1 ends a draft; got {_describe(tokens)}."
        )
    if tokens.shape != (batch_size, num_rows - 1):
        raise ValueError(
            f"draft.tokens must have shape [B, K] = [{batch_size}, {num_rows - 1}] beside target_logits [B, K+1, V] = "
            f"{[batch_size, num_rows, vocab_size]}; got {_describe(tokens)}. "
            "Is the target's row for the bonus token missing?"
        )
    expected = (batch_size, num_rows - 1, vocab_size)
    if draft.logits is not None:
        floating("draft.logits", draft.logits)
        if draft.logits.shape != expected:
            raise ValueError(
                f"draft.logits must have shape [B, K, V] = {list(expected)}; got {_describe(draft.logits)}. "
                "Both models must share one vocabulary: pad the shorter logits with -inf."
            )
    if draft.sampling is not None:
        if draft.logits is None:
            raise ValueError("draft.sampling needs draft.logits, which are None: leave draft.sampling None.")
        sampling("draft.sampling", draft.sampling, batch_size)
    if draft.log_normalizers is not None:
        if draft.logits is None:
            raise ValueError(
                "draft.log_normalizers need draft.logits, which are None: leave draft.log_normalizers None."
            )
        floating("draft.log_normalizers", draft.log_normalizers, "They are the second output of `sample`.")
        if draft.log_normalizers.shape != expected[:2]:
            raise ValueError(
                f"draft.log_normalizers must have shape [B, K] = {list(expected[:2])}; "
                f"got {_describe(draft.log_normalizers)}."
            )


def implementation(name: str | None) -> None:
    """None, or the name of an implementation."""
    if name not in (None, "xla", "pallas"):
        raise ValueError(f'implementation must be None, "xla" or "pallas"; got {name!r}.')


def pair(target_logits: Any, draft_logits: Any) -> None:
    """Logits of one shape `[..., V]` from target and draft."""
    floating("target_logits", target_logits)
    floating("draft_logits", draft_logits)
    if target_logits.shape != draft_logits.shape or not target_logits.shape:
        raise ValueError(
            f"target_logits and draft_logits must have one shape [..., V]; got {_describe(target_logits)} and "
            f"{_describe(draft_logits)}. Is the target's bonus row among them?"
        )
    _holds_tokens("target_logits", target_logits)


# Arguments of the decoding loop


def lengths(name: str, value: Any, least: int) -> None:
    """A tuple of draft lengths, ascending from at least `least`."""
    if not isinstance(value, tuple):
        raise ValueError(f"{name} must be a tuple, because each length is compiled; got {value!r}.")
    for length in value:
        count(f"Each of {name}", length, least)
    if not value or not all(a < b for a, b in itertools.pairwise(value)):
        raise ValueError(f"{name} must be ascending and at least {least}; got {value}.")


def prompt(prompt: Any, max_new_tokens: Any, prompt_lengths: Any) -> None:
    """Shapes and types of prompts, their lengths, and the number of new tokens; see `prompt_ids` for the values."""
    array("prompt", prompt)
    if prompt.ndim != 2 or not _is(jnp.integer, prompt) or prompt.shape[1] == 0:
        raise ValueError(
            f"prompt must be token ids of shape [B, P], at least one per row; got {_describe(prompt)}. "
            "A single prompt is [1, P]."
        )
    count("max_new_tokens", max_new_tokens, 1)
    if prompt_lengths is None:
        return
    integers("prompt_lengths", prompt_lengths)
    if prompt_lengths.shape != (prompt.shape[0],):
        raise ValueError(f"prompt_lengths must have shape [B] = [{prompt.shape[0]}]; got {_describe(prompt_lengths)}.")
    lengths = _concrete(prompt_lengths)
    if lengths is not None and not np.all((lengths >= 1) & (lengths <= prompt.shape[1])):
        raise ValueError(f"prompt_lengths must be from 1 to P = {prompt.shape[1]}; got {lengths}.")


def prompt_ids(prompt: Any, prompt_lengths: Any, vocab_size: int) -> None:
    """Token ids below V in each prompt; columns past its length are not checked."""
    ids, lengths = _concrete(prompt), None if prompt_lengths is None else _concrete(prompt_lengths)
    if ids is None or (prompt_lengths is not None and lengths is None):
        return
    if lengths is not None:
        ids = ids[np.arange(ids.shape[1]) < lengths[:, None]]
    token_ids("prompt", ids, vocab_size)


def end_tokens(eos_token: Any, vocab_size: int | None) -> None:
    """None, an id, or a sequence or one-axis array of ids; below V if `vocab_size` is not None."""
    if eos_token is None:
        return
    highest = LARGEST if vocab_size is None else vocab_size - 1
    message = f"eos_token must be None, a token id from 0 to {highest}, or several of them; got {{}}."
    several = isinstance(eos_token, Sequence) and not isinstance(eos_token, str | bytes)
    for value in eos_token if several else (eos_token,):
        whole_number = isinstance(value, int) and not isinstance(value, bool)
        if not whole_number and not (isinstance(value, _ARRAYS) and _is(jnp.integer, value)):
            raise ValueError(message.format(_describe(value)))
        if np.ndim(value) > (0 if several else 1):
            raise ValueError(message.format(_describe(value)))
        ids = _concrete(value)
        if ids is not None and not np.all((ids >= 0) & (ids <= highest)):
            raise ValueError(message.format(ids))


def model_output(result: Any, tokens: Any) -> None:
    """`(logits [B, T, V], cache)`, as `Model.apply_fn` returns it for tokens `[B, T]`."""
    expected = f"apply_fn must return (logits [B, T, V], cache) for tokens [B, T] = {list(tokens.shape)}"
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise ValueError(f"{expected}; got {_describe(result)}. A model without a cache returns () as the cache.")
    found = result[0]
    if not isinstance(found, _ARRAYS) or found.ndim != 3 or found.shape[:2] != tokens.shape or found.shape[2] == 0:
        raise ValueError(f"{expected}; its first item is {_describe(found)}. Are logits and cache swapped?")
    floating("logits of apply_fn", found)
