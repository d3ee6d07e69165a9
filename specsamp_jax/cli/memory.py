"""Estimates the memory of a generation before it is compiled."""

from collections.abc import Sequence

import jax

from specsamp_jax._types import Model
from specsamp_jax.decoding.memory import free_bytes, gigabytes, num_bytes

_LONGEST_DRAFT = 32  # of `--num-draft`


def check(
    models: Sequence[Model],
    batch_size: int,
    prompt_length: int,
    max_new_tokens: int,
    *,
    num_heads: Sequence[int],
    max_length: int | None,
) -> None:
    """Raises ValueError if a generation would need more memory than is free.

    Counted are the caches of all models, and the attention scores of the prompt in float32, which XLA holds for one
    layer at a time.

    Args:
      models: The models that run.
      batch_size: Rows.
      prompt_length: Tokens of the longest prompt.
      max_new_tokens: Most tokens that a row may gain.
      num_heads: Attention heads of each model.
      max_length: The longest text that the target was trained on, for the message.
    """
    free = free_bytes()
    length = prompt_length + max_new_tokens + _LONGEST_DRAFT
    caches = sum(_cache_bytes(model) for model in models) * batch_size * length
    scores = 4 * batch_size * max(num_heads) * prompt_length * length
    if free is None or caches + scores <= free:
        return
    allowed = "" if max_length is None else f" The target was trained on texts of up to {max_length:,} tokens."
    raise ValueError(
        f"{batch_size} x {max_new_tokens:,} new tokens after prompts of up to {prompt_length:,} would take "
        f"{gigabytes(caches)} for the caches and {gigabytes(scores)} for the attention scores of the prompts, and "
        f"{gigabytes(free)} are free.{allowed}"
    )


def _cache_bytes(model: Model) -> int:
    """The bytes of a cache per row and position."""
    return num_bytes(jax.eval_shape(lambda: model.init_cache_fn(1, 1)))
