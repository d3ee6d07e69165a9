"""The static key-value cache of one attention layer: one slot per position."""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Bool, Float, Int, Shaped


class LayerCache(NamedTuple):
    """Keys and values of one attention layer for B sequences, S slots each.

    Attributes:
      keys: Keys, rotated to their positions.
      values: Values.
    """

    keys: Float[Array, "B S KV D"]
    values: Float[Array, "B S KV D"]


export.register_namedtuple_serialization(LayerCache, serialized_name="specsamp_jax.LayerCache")

Cache = tuple[LayerCache, ...]
"""The cache of a whole model, first layer first."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Makes empty caches: an `init_cache_fn` that is equal to another one of the same sizes.

    Attributes:
      num_layers: Attention layers.
      num_kv_heads: Heads of keys and values.
      head_dim: Features of a head.
      dtype: Dtype of keys and values.
      drops_positions: Entries past the last slot are dropped, as `write_positions` does.
    """

    drops_positions: ClassVar[bool] = True
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any

    def __call__(self, batch_size: int, max_length: int) -> Cache:
        """Returns a cache of zeros, with slots for positions 0 to `max_length - 1` of each sequence."""
        shape = (batch_size, max_length, self.num_kv_heads, self.head_dim)
        return tuple(
            LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.num_layers)
        )


def write_positions(
    slots: Shaped[Array, "B S *rest"], new: Shaped[Array, "B T *rest"], positions: Int[Array, "B T"]
) -> Shaped[Array, "B S *rest"]:
    """Returns `slots` with `new[b, t]` in `slots[b, positions[b, t]]`.

    Entries with a position below 0 or past the last slot are dropped. If a position occurs twice in one row of the
    batch, either entry may be written, so both must be equal.

    Args:
      slots: The cache.
      new: Entries to write, cast to the dtype of `slots`.
      positions: Slot of each entry, per row.
    """

    def write_row(slots, new, positions):
        return slots.at[positions].set(new, mode="drop", wrap_negative_indices=False)

    return jax.vmap(write_row)(slots, new.astype(slots.dtype), positions)


def causal_mask(
    positions: Int[Array, "B T"], num_slots: int, window: int | None = None
) -> Bool[Array, "B T {num_slots}"]:
    """Returns the mask of slots that each query attends: those up to its own position, or the last `window` of them."""
    slots = jnp.arange(num_slots)
    mask = slots <= positions[..., None]
    return mask if window is None else mask & (slots > positions[..., None] - window)
