"""Helpers for meshes whose axes are explicit, automatic, or manual (inside `shard_map`)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def with_automatic_axes(fn: Callable[..., Any], *arguments: Any) -> Any:
    """Returns `fn(*arguments)`, with every explicit mesh axis automatic while `fn` runs.

    Under explicit sharding the type of an array says how it is sharded, and JAX refuses operations whose result
    could be sharded in more than one way: most reshapes, gathers and slices of a sharded vocabulary. XLA's
    partitioner decides those as it does under automatic sharding. The first axis of every output is the batch,
    sharded like that of the first sharded input.

    Args:
      fn: A function of pytrees whose arrays have the batch as first axis. Python numbers are passed unchanged.
      arguments: Arguments of `fn`; the first one with a sharded batch decides the sharding of the outputs.
    """
    leaves, tree = jax.tree.flatten(arguments)
    is_array = [isinstance(leaf, jax.Array) for leaf in leaves]
    shardings = [jax.typeof(leaf).sharding for leaf, array in zip(leaves, is_array, strict=True) if array]
    meshes = [sharding.mesh for sharding in shardings if explicit_axes(sharding.mesh)]
    if not meshes:
        return fn(*arguments)
    specs = [sharding.spec[0] for sharding in shardings if len(sharding.spec) and sharding.spec[0] is not None]
    batch = NamedSharding(meshes[0], PartitionSpec(specs[0] if specs else None))

    def on_arrays(*arrays):
        rest = iter(arrays)
        merged = [next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)]
        return fn(*jax.tree.unflatten(tree, merged))

    arrays = (leaf for leaf, array in zip(leaves, is_array, strict=True) if array)
    return jax.sharding.auto_axes(on_arrays, axes=explicit_axes(meshes[0]), out_sharding=batch)(*arrays)


def explicit_axes(mesh: Any) -> tuple[str, ...]:
    """Returns the names of the explicit axes of a mesh."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def cond(pred: Any, true_fn: Callable[[], Any], false_fn: Callable[[], Any]) -> Any:
    """Like `lax.cond` without operands, for branches that vary over different manual mesh axes.

    Inside `shard_map` a constant varies over no mesh axis, an input over some. JAX casts the operands of arithmetic to
    the union of their axes, but not the results of branches.
    """
    return lax.cond(pred, *same_axes(true_fn, false_fn))


def same_axes(*branches: Callable[..., Any], arguments: tuple = ()) -> tuple[Callable[..., Any], ...]:
    """Wraps the branches so that each output varies over the union of the manual mesh axes it has in any branch."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return branches
    leaves = [jax.tree.leaves(jax.eval_shape(branch, *arguments)) for branch in branches]
    axes = [frozenset().union(*map(_varying, outputs)) for outputs in zip(*leaves, strict=True)]

    def cast(branch: Callable[..., Any]) -> Callable[..., Any]:
        def cast_branch(*arguments):
            outputs, tree = jax.tree.flatten(branch(*arguments))
            return jax.tree.unflatten(tree, [_vary(x, names) for x, names in zip(outputs, axes, strict=True)])

        return cast_branch

    return tuple(map(cast, branches))


def replace_empty(tree: Any) -> Any:
    """Replaces arrays without elements by new ones.

    XLA of JAX 0.11.2 ends the process while it compiles a `shard_map` one of whose inputs has no element and is read.
    """
    return jax.tree.map(lambda leaf: leaf if leaf.size else jnp.zeros(leaf.shape, leaf.dtype), tree)


def vary_like(tree: Any, like: Any) -> Any:
    """Casts the arrays of `tree` to vary over all manual mesh axes that any array of `like` varies over."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return tree
    axes = frozenset().union(*(_varying(jax.typeof(leaf)) for leaf in jax.tree.leaves(like)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def _varying(type_: Any) -> frozenset[str]:
    return type_.manual_axis_type.varying


def _vary(array: Any, axes: frozenset[str]) -> Any:
    missing = tuple(sorted(axes - _varying(jax.typeof(array))))
    return lax.pcast(array, missing, to="varying") if missing else array
