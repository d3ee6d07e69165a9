"""The static key-value cache of one attention layer: one slot a position."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class LayerCache(NamedTuple):
    """What one attention layer remembers of B sequences, S slots each.

    Attributes:
      keys: Keys, rotated to their positions.
      values: Values.
    """

    keys: Float[Array, "B S KV D"]
    values: Float[Array, "B S KV D"]


Cache = tuple[LayerCache, ...]
"""The cache of a whole model, first layer first."""


@dataclasses.dataclass(frozen=True)
class CacheSpec:
    """Makes empty caches: an `init_cache_fn` that is equal to another one of the same sizes.

    Attributes:
      num_layers: Attention layers.
      num_kv_heads: Heads of keys and values.
      head_dim: Features of a head.
      dtype: What keys and values are kept in.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: Any

    def __call__(self, batch_size: int, max_length: int) -> Cache:
        """Returns a cache of zeros, with room for positions 0 to `max_length - 1` of each sequence."""
        shape = (batch_size, max_length, self.num_kv_heads, self.head_dim)
        return tuple(
            LayerCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)) for _ in range(self.num_layers)
        )


def write_positions(
    slots: Shaped[Array, "B S *rest"], new: Shaped[Array, "B T *rest"], positions: Int[Array, "B T"]
) -> Shaped[Array, "B S *rest"]:
    """Returns `slots` with `new[b, t]` in `slots[b, positions[b, t]]`, in place of what was there.

    A position below 0 or past the last slot is dropped. Where a position occurs twice in a row, either value
    may win, so the same position must bring the same value.

    Args:
      slots: What there is.
      new: What is written, cast to the dtype of `slots`.
      positions: Where to write it, per row.
    """

    def write_row(slots, new, positions):
        return slots.at[positions].set(new, mode="drop", wrap_negative_indices=False)

    return jax.vmap(write_row)(slots, new.astype(slots.dtype), positions)


def causal_mask(
    positions: Int[Array, "B T"], num_slots: int, window: int | None = None
) -> Bool[Array, "B T {num_slots}"]:
    """Returns what each query may attend: the slots up to its own position, or the last `window` of them."""
    slots = jnp.arange(num_slots)
    mask = slots <= positions[..., None]
    return mask if window is None else mask & (slots > positions[..., None] - window)
