"""Vocabulary size of a model, and its adaptation to that of another model."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from specsamp_jax._types import Model


@dataclasses.dataclass(frozen=True)
class _WithVocabSize:
    """`apply_fn` of a model of `own_size` tokens, as one of `vocab_size`."""

    apply_fn: Callable[..., Any]
    own_size: int
    vocab_size: int

    def __call__(self, params, tokens, positions, cache):
        logits, cache = self.apply_fn(params, jnp.minimum(tokens, self.own_size - 1), positions, cache)
        logits = logits[..., : self.vocab_size]
        missing = ((0, 0), (0, 0), (0, self.vocab_size - logits.shape[-1]))
        return jnp.pad(logits, missing, constant_values=-jnp.inf), cache


def vocab_size(model: Model) -> int:
    """Returns how many logits the model has; traces the model without computing anything.

    Example:
      >>> from specsamp_jax.cli.pair import load_pair
      >>> vocab_size(load_pair().drafter)
      4096
    """
    token = jnp.zeros((1, 1), jnp.int32)

    def logits(params):
        return model.apply_fn(params, token, token, model.init_cache_fn(1, 1))[0]

    return jax.eval_shape(logits, model.params).shape[-1]


def with_vocab_size(model: Model, size: int) -> Model:
    """Returns the drafter with `size` logits; the model itself if it has that many.

    Families pad the vocabularies of their sizes differently: Qwen2.5 has 151,936 logits at half a billion parameters
    and 152,064 at seven billion, over one tokenizer. Logits that the drafter lacks are -inf, and those that it has
    beyond are left out. Both are exact, because verification is exact for any draft distribution. A token id
    beyond the drafter's vocabulary is fed to it as its last id, which only lowers acceptance.

    Do not use this for a target: it would change the target's distribution.

    Args:
      model: The drafter.
      size: The target's number of logits, as `vocab_size` counts them.

    Raises:
      ValueError: `size` is below 1.

    Example:
      >>> from specsamp_jax.cli.pair import load_pair
      >>> token, drafter = jnp.zeros((1, 1), jnp.int32), with_vocab_size(load_pair().drafter, 4100)
      >>> logits, _ = drafter.apply_fn(drafter.params, token, token, drafter.init_cache_fn(1, 1))
      >>> logits.shape, logits[0, 0, 4096:].tolist()
      ((1, 1, 4100), [-inf, -inf, -inf, -inf])
    """
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}.")
    own_size = vocab_size(model)
    if own_size == size:
        return model
    return dataclasses.replace(model, apply_fn=_WithVocabSize(model.apply_fn, own_size, size))
