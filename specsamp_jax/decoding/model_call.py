"""Calls of a `Model`, with validation of its outputs, and the size of its vocabulary without running it."""

import functools
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from specsamp_jax import _checks
from specsamp_jax._files import brief
from specsamp_jax._types import Model


@runtime_checkable
class DropsPositions(Protocol):
    """Protocol of an `init_cache_fn` whose caches drop what is written past their last slot.

    They need no slots for drafts beyond the longest text. So the target's cache is as long as without a drafter, and a
    step without drafts takes as long: with 16 sequences on a CPU, 164 slots for 160 cost 9 %.
    """

    drops_positions: bool


def num_slots(model: Model, length: int, longest_draft: int) -> int:
    """The `max_length` of a target's cache, for texts of at most `length` tokens.

    Drafts past a row's limit reach position `length + longest_draft - 2`. No kept token depends on their entries.
    """
    return length if isinstance(model.init_cache_fn, DropsPositions) else length + longest_draft


def apply(model: Model, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Any) -> tuple[Array, Any]:
    """Returns the model's logits `[B, T, V]` and cache.

    Raises:
      ValueError: The model returns another structure, shape or dtype.
    """
    result = model.apply_fn(model.params, tokens, positions, cache)
    _checks.model_output(result, tokens)
    _check_cache(cache, result[1])
    return result[0], result[1]


def prefill(model: Model, tokens: Int[Array, "B W"], max_length: int) -> Any:
    """The model's cache after it has seen the tokens at positions 0 to W - 1."""
    return _first_pass(model, tokens, max_length=max_length)[1]


def output_shapes(model: Model, shape: tuple[int, int], max_length: int) -> tuple[Any, Any]:
    """Shapes of logits of no tokens `[B, 0, V]` and of the cache, for prompts of this shape.

    Traces the same function as `prefill`, which reuses it.
    """
    leaves, structure = jax.tree.flatten(model)
    # JAX takes .3 ms to find an earlier trace, three times in a call of `generate`. Symbolic sizes of an export are not
    # remembered, because they cannot be compared between exports.
    remembers = all(isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) for leaf in leaves)
    remembers &= all(isinstance(size, int) for size in (*shape, max_length))
    if not remembers:
        return _traced_shapes(model, shape, max_length)
    params = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    key = structure, params, shape, max_length, jax.config.jax_enable_x64
    shapes = _SHAPES.get(key)
    if shapes is None:
        if len(_SHAPES) >= _MOST_SHAPES:
            _SHAPES.clear()
        shapes = _SHAPES[key] = _traced_shapes(model, shape, max_length)
    return shapes


_SHAPES: dict[Any, tuple[Any, Any]] = {}
_MOST_SHAPES = 64


def _traced_shapes(model: Model, shape: tuple[int, int], max_length: int) -> tuple[Any, Any]:
    return _first_pass.eval_shape(model, jax.ShapeDtypeStruct(shape, jnp.int32), max_length=max_length)


def vocab_size(model: Model, shape: tuple[int, int], max_length: int) -> int:
    """V of the model's logits, for prompts of this shape."""
    return output_shapes(model, shape, max_length)[0].shape[-1]


@functools.partial(jax.jit, static_argnames=("max_length",))
def _first_pass(model: Model, tokens: Int[Array, "B W"], *, max_length: int) -> tuple[Float[Array, "B 0 V"], Any]:
    """The cache, and logits of zero tokens, which have the vocabulary's size and cost nothing."""
    batch_size, width = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    logits, cache = apply(model, tokens, positions, model.init_cache_fn(batch_size, max_length))
    return logits[:, :0], cache


def _check_cache(cache: Any, returned: Any) -> None:
    """Raises ValueError if a returned cache has another structure, shape or dtype than the one before."""
    expected = "apply_fn must return a cache like the one that it was given, because steps run in a loop"
    before, after = jax.tree.structure(cache), jax.tree.structure(returned)
    if before != after:
        raise ValueError(f"{expected}; it was given {brief(before)} and returned {brief(after)}.")
    for (path, old), new in zip(jax.tree.leaves_with_path(cache), jax.tree.leaves(returned), strict=True):
        was, became = jax.typeof(old), jax.typeof(new)
        if was.shape != became.shape or was.dtype != became.dtype:
            raise ValueError(
                f"{expected}; cache{jax.tree_util.keystr(path)} was {was.str_short()} and became {became.str_short()}."
            )
