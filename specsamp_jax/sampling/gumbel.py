"""Samples by Gumbel noise that a drafter and the target can share: the largest of log-probability plus noise."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random
from jax.extend.random import threefry_2x32
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import TILE, KeyLike, SamplingParams
from specsamp_jax.sampling import kernels, streams
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.draw import replace_degenerate
from specsamp_jax.sampling.filters import call_unfiltered_if_off, make_filter
from specsamp_jax.sampling.mesh_axes import vary_like, with_automatic_axes
from specsamp_jax.sampling.reduce import at_least_16_bits, wide
from specsamp_jax.sampling.streams import Purpose


@allow_rank_promotion
def sample_coupled(
    key: KeyLike,
    logits: Float[Array, "B V"],
    sampling: SamplingParams | None = None,
    *,
    positions: ArrayLike = 0,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples one token per row with the noise of `verify_coupled`, and returns the logsumexp of the filtered logits.

    The token is the first largest of `log q + G`, where the Gumbel noise `G` is a function of the row's key, the
    position and the token's id. `verify_coupled` with the same key uses the same noise for the same position, so that
    draft and target often agree. Mark such drafts with `Draft(..., noise=CoupledNoise())`: `verify` and `verify_block`
    refuse them. Degenerate rows are those of `sample`.

    Args:
      key: One JAX key, or one per row: the key that `verify_coupled` gets.
      logits: Any floating-point type. Probabilities cannot be told from logits: pass their logarithm.
      sampling: Temperature and filters for the logits; None is temperature 1 with no filter.
      positions: Position of the token in its row's text: draft i of a step has that of `verify_coupled` plus i.

    Returns:
      tokens `[B]` and log_normalizers `[B]`, as `Draft` takes them (stacked along K).

    Raises:
      ValueError: An argument has a wrong shape, type or value.

    Source: Daliri et al. (2024, arXiv 2408.07978).

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> key, logits = jax.random.key(0), jnp.array([[0.0, 1.0, 2.0]])
      >>> tokens, _ = ss.sample_coupled(key, logits)
      >>> draft = ss.Draft(tokens[:, None], noise=ss.CoupledNoise())
      >>> ss.verify_coupled(key, jnp.stack([logits, logits], axis=1), draft).num_accepted.tolist()
      [1]
    """
    _checks.logits("logits", logits, "B V")
    logits = at_least_16_bits(jnp.asarray(logits))
    batch_size, vocab_size = logits.shape
    if sampling is not None:
        _checks.sampling("sampling", sampling, batch_size)
    positions = position_array(positions, batch_size)

    def draw(logits, words, positions, sampling):
        """Samples from one row of logits per sequence."""
        keys = noise_keys(streams.row_keys(words, batch_size), positions, 1)

        def apply(sampling):
            rows = dist.target_rows(logits[:, None], make_filter(logits[:, None], sampling))
            token = largest_perturbed(logits[:, None], rows, keys)[:, 0]
            return replace_degenerate(token, logits, rows.degenerate[:, 0]), rows.log_normalizers[:, 0]

        return call_unfiltered_if_off(apply, *kernels.merge(*kernels.split(sampling)), vocab_size=vocab_size)

    return with_automatic_axes(draw, logits, streams.words(key, batch_size), positions, sampling)


def position_array(positions: ArrayLike | None, batch_size: _checks.Size) -> Int[Array, "B"]:
    """Checks the positions and returns one per row."""
    _checks.whole("positions", positions, batch_size, "0 is the first token of a text")
    return jnp.broadcast_to(jnp.asarray(positions, jnp.int32), (batch_size,))


def noise_keys(keys: Key[Array, "B"], positions: Int[Array, "B"], num_rows: int) -> Key[Array, "B R"]:
    """The key of the noise at `num_rows` consecutive positions of each row, the first of them in `positions`."""
    keys = streams.fold_in(keys, Purpose.COUPLED)
    return jax.vmap(jax.vmap(random.fold_in, (None, 0)))(keys, positions[:, None] + jnp.arange(num_rows))


def noise(keys: Key[Array, "B R"], tile: Int[Array, ""] | int, num_tokens: int) -> Float[Array, "B R n"]:
    """Standard Gumbel noise in float32 for the `num_tokens` tokens of one tile of the vocabulary.

    `-log(-log(1 - u))` with u a multiple of 2**-32, rounded to 24 bits that hold: the noise is large where u is small,
    and there its steps stay fine. With u a multiple of 2**-24, a token of probability 1e-6 would be drawn with an error
    of percents. The largest value is 22.9, the smallest -2.9.
    """
    counts = jnp.arange(num_tokens, dtype=jnp.uint32)

    def draw(key):
        # Two numbers per hash: `random.bits` makes one of them by default, in twice the time.
        bits = threefry_2x32(random.key_data(random.fold_in(key, tile)), counts)
        # Half a step above zero; and below 1, to which the largest bits are rounded.
        u = jnp.minimum(bits.astype(jnp.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
        return -jnp.log(-jnp.log1p(-u))

    return jax.vmap(jax.vmap(draw))(keys)


class _Best(NamedTuple):
    """The largest value of each row so far, and its token.

    Attributes:
      value: Log-probability plus noise, up to a constant of the row.
      token: The first token with this value.
    """

    value: Float[Array, "B R"]
    token: Int[Array, "B R"]


def largest_perturbed(logits: Float[Array, "B R V"], rows: dist.Rows, keys: Key[Array, "B R"]) -> Int[Array, "B R"]:
    """The token that each row of the target samples: the first largest log-probability plus noise, or the greedy token.

    The vocabulary is read tile by tile, and the noise of a tile is computed where it is used, so that no array is as
    large as the logits. A token that the filter drops, or whose logit is -inf, is never returned unless the row is
    degenerate.
    """
    vocab_size = logits.shape[-1]
    width = min(TILE, vocab_size)
    index = jnp.arange(width, dtype=jnp.int32)

    def compare(tile, best: _Best) -> _Best:
        # The last tile begins early enough to be whole; its tokens that the one before it has are left out.
        start = jnp.minimum(tile * TILE, vocab_size - width)
        part = wide(lax.dynamic_slice_in_dim(logits, start, width, axis=-1))
        value = dist.scaled(part - rows.offset[..., None], rows.filter.scale) + noise(keys, tile, width)
        kept = start + index >= tile * TILE
        if rows.filter.cutoff is not None:
            kept &= part >= rows.filter.cutoff[..., None]
        value = jnp.where(kept, value, -jnp.inf)
        largest = value.max(-1)
        first = jnp.where(value == largest[..., None], index, width - 1).min(-1)
        improved = largest > best.value
        return _Best(jnp.where(improved, largest, best.value), jnp.where(improved, start + first, best.token))

    best = _Best(jnp.full_like(rows.offset, -jnp.inf), jnp.zeros(rows.offset.shape, jnp.int32))
    best = vary_like(best, (logits, rows.offset, rows.filter, keys))
    best = lax.fori_loop(jnp.int32(0), jnp.int32(-(-vocab_size // TILE)), compare, best)
    return best.token if rows.certain is None else jnp.where(rows.certain >= 0, rows.certain, best.token)
