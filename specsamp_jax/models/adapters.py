"""Adapters from Flax modules, NNX or Linen, to `Model`.

The functions of a `Model` are static to `jax.jit`, which retraces for each new function. Therefore they are frozen
objects here, equal if their modules are equal: adapting a module again does not retrace.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from specsamp_jax._types import Model
from specsamp_jax.models.cache import write_positions


@dataclasses.dataclass(frozen=True)
class _NNXCall:
    """`(params, *arguments) -> module(*arguments)`, for an NNX module in two halves."""

    graphdef: Any

    def __call__(self, params, *arguments):
        return nnx.merge(self.graphdef, params)(*arguments)


@dataclasses.dataclass(frozen=True)
class _NNXInitCache:
    """The module's method `name` without its weights; instances with equal graphs are equal.

    Attributes:
      graphdef: The module without its variables.
      name: The method, `(batch_size, max_length) -> cache`.
      shapes: Shapes and dtypes of the variables; not compared, because they follow from the graph.
    """

    graphdef: Any
    name: str
    shapes: Any = dataclasses.field(compare=False, repr=False)

    def __call__(self, batch_size: int, max_length: int):
        module = nnx.merge(self.graphdef, self.shapes)
        return getattr(module, self.name)(batch_size, max_length)


@dataclasses.dataclass(frozen=True)
class _LinenCall:
    """`(variables, *arguments) -> module(*arguments)`, for a Linen module."""

    module: linen.Module

    def __call__(self, variables, *arguments):
        return self.module.apply(variables, *arguments)


@dataclasses.dataclass(frozen=True)
class _Recompute:
    """Gives a causal model without a cache one: the cache is the text so far, on all of which each call runs."""

    call: Callable[..., Any]

    def __call__(self, params, tokens, positions, text):
        text = write_positions(text, tokens, positions)
        return jnp.take_along_axis(self.call(params, text), positions[..., None], axis=1), text


@dataclasses.dataclass(frozen=True)
class _TextCache:
    """Returns an empty text, `[batch_size, max_length]` of token 0, to which no earlier position attends."""

    def __call__(self, batch_size: int, max_length: int):
        return jnp.zeros((batch_size, max_length), jnp.int32)


def _model(params: Any, call: Callable[..., Any], init_cache_fn: Callable[[int, int], Any] | None) -> Model:
    if init_cache_fn is None:
        return Model(params, _Recompute(call), _TextCache())
    return Model(params, call, init_cache_fn)


def from_nnx(module: nnx.Module, init_cache_fn: Callable[[int, int], Any] | None = None) -> Model:
    """Returns any NNX module as a `Model`.

    With a cache, the module is called as `module(tokens [B, T], positions [B, T], cache) -> (logits [B, T, V],
    cache)`, and must treat the cache as `Model` requires. Without one it is called as `module(tokens [B, L]) ->
    logits [B, L, V]` and must be causal; then the cache is the text so far and each call runs the module on all
    of it, `max_length` tokens: correct, but quadratic in the length.

    State that the module changes while it runs (counts, random streams) is discarded.

    Args:
      module: The module, in evaluation mode. All its variables become `params`.
      init_cache_fn: `(batch_size, max_length) -> cache`, hashable. None: the module's own `init_cache_fn`, as
        `Llama` has one; no cache if it has none. A method of the module is called with shapes and dtypes instead of
        weights, so that modules with equal graphs have equal functions.

    Example:
      >>> model = from_nnx(nnx.Embed(13, 13, rngs=nnx.Rngs(0)))  # an embedding of V features is a bigram model
      >>> tokens, positions = jnp.array([[5, 7]]), jnp.array([[0, 1]])
      >>> logits, cache = model.apply_fn(model.params, tokens, positions, model.init_cache_fn(1, 8))
      >>> logits.shape, cache.shape
      ((1, 2, 13), (1, 8))
    """
    graphdef, state = nnx.split(module)
    # A plain dict of arrays: jax flattens it in a third of the time that a State of Variables takes.
    params = nnx.to_pure_dict(state)
    init_cache_fn = init_cache_fn or getattr(module, "init_cache_fn", None)
    if inspect.ismethod(init_cache_fn) and init_cache_fn.__self__ is module:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
        init_cache_fn = _NNXInitCache(graphdef, init_cache_fn.__name__, shapes)
    return _model(params, _NNXCall(graphdef), init_cache_fn)


def from_linen(module: linen.Module, variables: Any, init_cache_fn: Callable[[int, int], Any] | None = None) -> Model:
    """Returns any Linen module as a `Model`.

    It is called as `module.apply(variables, ...)`, with the arguments that `from_nnx` describes, with a cache and
    without.

    Args:
      module: The module, in evaluation mode; its attributes must be hashable.
      variables: Variables of the module, such as `module.init` returns or training produces; they become `params`.
      init_cache_fn: `(batch_size, max_length) -> cache`, hashable. None: the module has no cache.

    Example:
      >>> import jax
      >>> module, tokens, positions = linen.Embed(13, 13), jnp.array([[5, 7]]), jnp.array([[0, 1]])
      >>> model = from_linen(module, module.init(jax.random.key(0), tokens))
      >>> logits, cache = model.apply_fn(model.params, tokens, positions, model.init_cache_fn(1, 8))
      >>> logits.shape, cache.shape
      ((1, 2, 13), (1, 8))
    """
    return _model(variables, _LinenCall(module), init_cache_fn)
