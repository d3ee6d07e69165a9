"""Judges the text of a window: silence, or a text to decode again at a higher temperature."""

import functools
import math
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from specsamp_jax._types import Model
from specsamp_jax.decoding.drafters import ProcessLogitsFn

# Tokens that are scored by one call of the model. Logits of all tokens of a window would take 370 MB at 8 windows.
_CHUNK = 32


class Fallback(NamedTuple):
    """Temperatures at which a window is decoded again, and the thresholds that decide it.

    A window is silent if the probability of "no speech" is above its threshold and the mean log-probability below
    its own: it has no text. Otherwise, if the text compresses too well or its mean log-probability is too low, the
    window is decoded again at the next temperature. The text at the last one is kept whatever its quality.

    Attributes:
      temperatures: Temperatures after the first, which is that of `sampling`. Empty: no window is decoded again.
      compression_ratio_threshold: The largest accepted ratio of a text's bytes in UTF-8 to those that zlib makes of
        them; repetitive texts are above it. None: any.
      logprob_threshold: The smallest accepted mean of the tokens' log-probabilities, the end token's included, at
        temperature 1. None: any, and then silence depends on `no_speech_threshold` alone.
      no_speech_threshold: The probability of "no speech" above which a window may be silent. None: no window is. With
        a threshold, a window without any sound, such as zeros, is always silent; the published procedure is not sure.

    Source: Radford et al. (2022, arXiv 2212.04356), section 4.5, and the published code. transformers compresses token
    ids instead of text, so that its ratios are smaller.
    """

    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 2.4
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6


KEEP, AGAIN, SILENT = "keep", "again", "silent"
"""Verdicts on the text of a window."""


def check(fallback: Fallback, no_speech_token: int | None) -> None:
    """Raises ValueError if a value is out of range, or if the checkpoint has no token for "no speech"."""
    for temperature in fallback.temperatures:
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperatures of the fallback must be finite and at least 0; got {temperature}.")
    for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
        value = getattr(fallback, name)
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, or None to switch it off; got {value}.")
    if fallback.no_speech_threshold is not None and no_speech_token is None:
        raise ValueError("no_speech_threshold must be None, because the checkpoint has no token for 'no speech'.")


def judge(fallback: Fallback, text: str, mean_log_prob: float, no_speech_prob: float) -> str:
    """Returns whether to `KEEP` a window's text, to decode it `AGAIN`, or that it is `SILENT`.

    Args:
      fallback: The thresholds.
      text: The text, without timestamps.
      mean_log_prob: The mean log-probability of its tokens.
      no_speech_prob: The probability of "no speech" after the start token.
    """
    most_compressed, least_probable = fallback.compression_ratio_threshold, fallback.logprob_threshold
    is_improbable = least_probable is not None and mean_log_prob < least_probable
    no_speech = fallback.no_speech_threshold is not None and no_speech_prob > fallback.no_speech_threshold
    if no_speech and (is_improbable or least_probable is None):
        return SILENT
    repeats = most_compressed is not None and compression_ratio(text.strip()) > most_compressed
    return AGAIN if repeats or is_improbable else KEEP


def compression_ratio(text: str) -> float:
    """Returns the bytes of a text in UTF-8 per byte of its compressed form."""
    content = text.encode("utf-8")
    return len(content) / len(zlib.compress(content))


def mean_log_probs(
    model: Model,
    tokens: Int[np.ndarray, "B L"],
    lengths: Int[np.ndarray, "B"],
    begin: int,
    process_logits_fn: ProcessLogitsFn,
) -> Float[np.ndarray, "B"]:
    """Returns the mean log-probability of each row's generated tokens at temperature 1, 0 for a row without any.

    Args:
      model: The target.
      tokens: Prompts and generated tokens, as in `Generation`.
      lengths: Tokens of each row; the end token counts.
      begin: Tokens of each prompt.
      process_logits_fn: A hashable processor, applied as in `generate`.
    """
    sums = np.asarray(_sums(model, tokens, lengths, begin=begin, process_logits_fn=process_logits_fn))
    return sums / np.maximum(lengths - begin, 1)


@functools.partial(jax.jit, static_argnames=("begin", "process_logits_fn"))
def _sums(model, tokens, lengths, *, begin, process_logits_fn) -> Float[Array, "B"]:
    batch_size, width = tokens.shape
    num_chunks = -(-(width - 1) // _CHUNK)
    # A token after every position that is scored; padding is any token.
    padded = jnp.pad(jnp.maximum(tokens, 0), ((0, 0), (0, num_chunks * _CHUNK + 1 - width)))

    def unfinished(carry):
        return carry[0] + 1 < jnp.max(lengths, initial=0)

    def score_chunk(carry):
        first, cache, sums = carry
        inputs = lax.dynamic_slice_in_dim(padded, first, _CHUNK, axis=1)
        positions = jnp.broadcast_to(first + jnp.arange(_CHUNK), inputs.shape)
        logits, cache = model.apply_fn(model.params, inputs, positions, cache)

        def score(t, sums):
            end = first + t + 1
            processed = process_logits_fn(padded, jnp.full(batch_size, end), logits[:, t])
            log_probs = jax.nn.log_softmax(processed.astype(jnp.float32), axis=1)
            found = jnp.take_along_axis(log_probs, padded[:, end, None], axis=1)[:, 0]
            return sums + jnp.where((end >= begin) & (end < lengths), found, 0.0)

        return first + _CHUNK, cache, lax.fori_loop(0, _CHUNK, score, sums)

    cache = model.init_cache_fn(batch_size, num_chunks * _CHUNK)
    return lax.while_loop(unfinished, score_chunk, (0, cache, jnp.zeros(batch_size, jnp.float32)))[2]
