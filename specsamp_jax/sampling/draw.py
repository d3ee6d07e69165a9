"""Drawing tokens: two-level inverse-CDF sampling, and `sample`, which drafters call."""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import TILE, KeyLike, SamplingParams
from specsamp_jax.sampling import kernels, streams
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.dispatch import dispatch
from specsamp_jax.sampling.filters import call_unfiltered_if_off, make_filter
from specsamp_jax.sampling.mesh_axes import cond, with_automatic_axes
from specsamp_jax.sampling.reduce import SMALL, at_least_16_bits, row_sum
from specsamp_jax.sampling.streams import Purpose

EVEN_TILES = 8
"""Long rows are summed in a multiple of this many tiles: of 151,936 logits 2 % more are added up than without."""


@allow_rank_promotion
def sample(
    key: KeyLike, logits: Float[Array, "B V"], sampling: SamplingParams | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples one token per row from the filtered logits, and returns the logsumexp of those; drafters call it.

    The draws are disjoint from those of `verify` for the same key. A row with NaN or +inf, or with no logit
    above -inf, yields its first largest logit, NaN ignored, and a logsumexp that is not finite.

    Args:
      key: One JAX key, or one per row; as in `verify`.
      logits: Any floating-point type. Probabilities cannot be told from logits: pass their logarithm.
      sampling: Temperature and filters for the logits; None is temperature 1 with no filter.

    Returns:
      tokens `[B]` and log_normalizers `[B]`, as `Draft` takes them (stacked along K).

    Raises:
      ValueError: An argument has a wrong shape, type or value.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> tokens, _ = ss.sample(jax.random.key(0), jnp.array([[0.0, 3.0]]), ss.SamplingParams(temperature=0.0))
      >>> int(tokens[0])
      1
    """
    _checks.logits("logits", logits, "B V")
    logits = at_least_16_bits(jnp.asarray(logits))
    batch_size = logits.shape[0]
    if sampling is not None:
        _checks.sampling("sampling", sampling, batch_size)
    return with_automatic_axes(_sample, logits, streams.words(key, batch_size), sampling)


def _sample(
    logits: Float[Array, "B V"], words: UInt32[Array, "*keys 2"], sampling: SamplingParams | None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    numbers, arrays = kernels.split(sampling)

    def core(logits, words, arrays):
        uniforms = streams.uniforms(streams.row_keys(words, logits.shape[0]), Purpose.DRAFT, 2)

        def weigh(sampling):
            rows = dist.target_rows(logits[:, None], make_filter(logits[:, None], sampling))
            p = dist.probs(rows, logits.shape[1])
            return p, tile_sums(p), rows.degenerate[:, 0], rows.log_normalizers[:, 0]

        parameters = kernels.merge(numbers, arrays)
        weighed = call_unfiltered_if_off(weigh, *parameters, vocab_size=logits.shape[1])
        weights, sums, degenerate, log_normalizers = weighed
        return replace_degenerate(sample_weights(weights, sums, uniforms), logits, degenerate), log_normalizers

    def kernel(logits, words, arrays):
        return kernels.sample(words, logits, *kernels.merge(numbers, arrays))

    return dispatch(core, kernel, (logits, words, arrays), functools.partial(kernels.why_not_sample, logits), None)


def tile_sums(weights: Float[Array, "B V"]) -> Float[Array, "B T"]:
    """Sums of weights over tiles of `TILE` elements, the last one possibly shorter.

    A long row is padded to a multiple of `EVEN_TILES` tiles, so that each of 2, 4 or 8 devices that share it can have
    as many tiles: they then exchange the tiles between their shares, where XLA would else gather the row.
    """
    batch_size, vocab_size = weights.shape
    num_tiles = -(-vocab_size // TILE)
    padding = -num_tiles % EVEN_TILES if vocab_size >= SMALL else 0
    width = (num_tiles + padding) * TILE
    padded = jnp.pad(weights, ((0, 0), (0, width - vocab_size)))
    return row_sum(padded.reshape(batch_size, num_tiles + padding, TILE), vocab_size)[:, :num_tiles]


def sample_index(weights: Float[Array, "*C n"], uniform: Float[Array, "*B"]) -> Int[Array, "*B"]:
    """Index of the first positive weight at which the running sum exceeds `uniform` times the total.

    An axis of size 1 of the weights serves all uniforms of that axis.

    If rounding leaves no such index, the last positive weight; if no weight is positive, 0. In all other cases the
    chosen weight is positive, however the running sums are rounded.
    """
    num_weights = weights.shape[-1]
    running = jnp.cumsum(weights, axis=-1)
    positive = weights > 0
    chosen = positive & (running > uniform[..., None] * running[..., -1:])
    # Not `argmax`, whose buffers delay each call on a CPU: see `call_unfiltered_if_off`.
    index = jnp.arange(num_weights, dtype=jnp.int32)
    first = jnp.where(chosen, index, num_weights).min(-1)
    last = jnp.where(positive, index, 0).max(-1)
    return jnp.where(first < num_weights, first, last)


def sample_weights(
    weights: Float[Array, "B V"], sums: Float[Array, "B T"], uniforms: Float[Array, "B 2"]
) -> Int[Array, "B"]:
    """Samples one token per row with probability proportional to its weight, in two levels.

    The first uniform picks a tile by its sum, the second an element of that tile by its weight. Two levels
    keep a probability exact to about 2**-24 of the sum of its tile. One running sum over the vocabulary would
    round each probability to a multiple of 2**-24 of the whole row: an error of percents for a rare token.
    """
    tile = sample_index(sums, uniforms[:, 0])
    return sample_in_tile(tile, tile_weights(weights, tile), uniforms[:, 1])


def tile_tokens(tile: Int[Array, "*B"]) -> Int[Array, "*B n"]:
    """The tokens of each tile; those of the last tile may be beyond the vocabulary."""
    return tile[..., None] * TILE + jnp.arange(TILE, dtype=tile.dtype)


def tile_weights(weights: Float[Array, "B V"], tile: Int[Array, "B"]) -> Float[Array, "B n"]:
    """The weights of one tile of each row; 0 beyond the vocabulary."""
    index = tile_tokens(tile)
    # An index beyond the vocabulary reads any weight, which the mask drops.
    within = jnp.take_along_axis(weights, index, axis=-1, mode="clip")
    return jnp.where(index < weights.shape[-1], within, 0)


def sample_in_tile(
    tile: Int[Array, "*B"], weights: Float[Array, "*B n"], uniform: Float[Array, "*B"]
) -> Int[Array, "*B"]:
    """Samples a token of each tile by the weights of its tokens."""
    return tile * TILE + sample_index(weights, uniform)


def replace_degenerate(
    token: Int[Array, "B"], logits: Float[Array, "B V"], degenerate: Bool[Array, "B"]
) -> Int[Array, "B"]:
    """Replaces the tokens of degenerate rows by their first largest logit, NaN ignored."""
    return cond(
        degenerate.any(),
        lambda: jnp.where(degenerate, dist.first_largest(logits), token),
        lambda: token,
    )
