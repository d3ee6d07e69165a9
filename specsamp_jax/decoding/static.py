"""Splits arguments of the decoding loop into static values, which decide the compiled program, and data.

Data may change without a new trace. Static values are hashable.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from specsamp_jax._types import SamplingParams
from specsamp_jax.sampling.filters import is_number

_OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}

FEWEST_ENDS = 4
"""End tokens are padded to this many, then to powers of two: published models have one to three."""

NO_TOKEN = -2
"""Padding of the end tokens: neither a token nor `PAD_TOKEN`."""

Fixed = tuple[tuple[str, Any], ...]


def split(sampling: SamplingParams, batch_size: int) -> tuple[Fixed, dict[str, Array | np.ndarray]]:
    """Returns names and values of the filters that are static and off, and the other parameters as arrays `[B]`.

    A filter that is switched off by a Python number is not compiled. The temperature and every other parameter are
    data: a number, a scalar array and one value per row use one program.
    """
    fixed, traced = {}, {}
    for name, value in sampling._asdict().items():
        if name in _OFF and is_number(value, _OFF[name]):
            fixed[name] = _OFF[name]
        else:
            traced[name] = _per_row(value, batch_size, int if name == "top_k" else float)
    return tuple(fixed.items()), traced


def join(fixed: Fixed, traced: dict[str, ArrayLike]) -> SamplingParams:
    """Inverse of `split`."""
    return SamplingParams(**dict(fixed), **traced)


def _per_row(value: Any, batch_size: int, kind: type) -> Array | np.ndarray:
    if not isinstance(value, jax.Array):
        # A NumPy array costs less to create than a JAX array, and is transferred when the program is called.
        return np.broadcast_to(np.asarray(value, jnp.dtype(jnp.result_type(kind))), (batch_size,))
    array = value.astype(jnp.result_type(kind))
    return array if array.shape == (batch_size,) else jnp.broadcast_to(array, (batch_size,))


def pad_end_tokens(eos_token: int | Sequence[int] | Int[Array, "E"] | None) -> Int[Array | np.ndarray, "N"]:
    """Pads the end tokens with `NO_TOKEN`, so that zero to `FEWEST_ENDS` of them use one program."""
    ends = eos_token if isinstance(eos_token, jax.Array) else np.asarray(() if eos_token is None else eos_token, int)
    ends = ends.reshape(-1).astype(np.int32)
    width = max(FEWEST_ENDS, 1 << max(ends.size - 1, 0).bit_length())
    pad = jnp.pad if isinstance(ends, jax.Array) else np.pad
    return pad(ends, (0, width - ends.size), constant_values=NO_TOKEN)


def split_processor(process_logits_fn: Callable[..., Any] | None) -> tuple[Callable[..., Any] | None, Any]:
    """Returns `(function, None)` for a processor that is compiled in, `(None, pytree)` for one that is data.

    A registered pytree is data, with its functions and static fields in the tree structure. Any other processor is
    compiled in: a function, or a hashable object; equal objects must compute equal results.

    Raises:
      ValueError: The processor is an object with attributes that JAX can neither see nor compare. If one of them
        changed, a program that is compiled already would ignore it.
    """
    if process_logits_fn is None:
        return None, None
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(process_logits_fn)):
        return None, process_logits_fn
    owner = process_logits_fn.__self__ if inspect.ismethod(process_logits_fn) else process_logits_fn
    if not inspect.isroutine(owner) and not inspect.isclass(owner) and _compared_by_identity(owner):
        raise ValueError(
            "process_logits_fn must be a function, a pytree, or hashable by its attributes; got "
            f"{type(owner).__name__}, whose attributes {sorted(vars(owner))} could change without the compiled program "
            "noticing. Make it a dataclass under jax.tree_util.register_dataclass, or pass "
            "jax.tree_util.Partial(function, arrays)."
        )
    return process_logits_fn, None


def join_processor(fn: Callable[..., Any] | None, data: Any) -> Callable[..., Any] | None:
    """Inverse of `split_processor`."""
    return data if fn is None else fn


def _compared_by_identity(value: Any) -> bool:
    """Whether `value` has attributes but no hash of its own, so that its changes are invisible to JAX."""
    return bool(getattr(value, "__dict__", None)) and type(value).__hash__ is object.__hash__
