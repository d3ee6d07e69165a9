"""The sigmoid rule in one launch: acceptance reads two logits per draft, then one pair of rows is read per sequence.

Launch `sigmoid`, grid (sequence), one cluster of blocks per sequence. Every block gathers the logits of the drafted
tokens and accepts or rejects them, so all blocks find the same emitting row. They divide the tiles of that row, and of
the draft's row if a draft was rejected, and write to global memory the tiles' sums and the groups' largest logits,
which show a degenerate row, one whose scores all underflow included. After a cluster barrier the last block emits the
token; block 0 writes the accepted drafts.

Order: the last block reads after the cluster barrier what the blocks write before it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import emit, random, rows, scan, sync, tiles
from pallas_kernels.random import Draws
from pallas_kernels.types import Filter, SigmoidVerification


class Sigmoid(NamedTuple):
    """The scores s(z) = sigmoid((z - alpha) / width)."""

    alpha: float
    width: float


class Stop(NamedTuple):
    """The row at which a sequence stops and from which it emits its last token.

    Attributes:
      num_accepted: Number of accepted drafts, which is the index of the row.
      rejecting: Whether the draft in this row was rejected.
      certain: The rejected draft if q has all probability on it, else -1.
      beyond: Whether the rejected draft is no token of the vocabulary.
    """

    num_accepted: jax.Array
    rejecting: jax.Array
    certain: jax.Array
    beyond: jax.Array


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    draft_tokens: Int[Array, "B K"],
    draws: Draws,
    *,
    alpha: float,
    beta: float,
    config: sizes.Config | None = None,
) -> SigmoidVerification:
    """Returns the verification by the sigmoid rule of Wagner et al. (2024, arXiv 2406.11016), on Hopper or newer.

    Accepts drafts while `u * s_q < s_p`, u a uniform of each, then emits one token from max(s_p - s_q, 0), or from s_p
    after all drafts were accepted. Types and shapes are those of `token.verify_token`; `config` is chosen by
    `config.sigmoid_config` if None.

    Raises:
      NotImplementedError: A target row may be greedy, which would need the first largest logit of all rows.
    """
    if target_filter.greedy is not None:
        raise NotImplementedError("the sigmoid kernel does not support greedy target rows")
    batch_size, num_rows, vocab_size = target_logits.shape
    num_draft, score = num_rows - 1, Sigmoid(float(alpha), float(beta - alpha))
    inputs = rows.make_inputs(target_logits, target_filter, draft_logits, draft_filter, None, draft_tokens, draws)
    config = config or sizes.sigmoid_config(batch_size, vocab_size)
    groups = sizes.groups(vocab_size, [ref.dtype for ref in inputs.logits], config)

    def sigmoid(inputs, out, sums, tops, scratch, barrier):
        sequence = rows.sequence_view(inputs, vocab_size)

        def meet(is_last):
            sync.sync_cluster(barrier)
            return is_last

        emission = emit.make_emission(sequence, out, sums, scratch, groups, config.blocks, meet)
        stop = _decide(emission, score)
        if num_draft:
            pl.when(stop.rejecting)(lambda: _sum_tiles(emission, score, stop, tops, residual_weights))
        # The draft's row is read only if a draft was rejected.
        pl.when(~stop.rejecting)(lambda: _sum_tiles(emission, score, stop, tops, target_weights))
        emits = emission.meet_fn()
        tokens = inputs.draft_tokens

        @pl.when(emission.block == 0)
        def _():
            emit.write_drafts(emission, stop.num_accepted, lambda row: tokens[sequence.number, row], lambda row: None)

        pl.when(emits)(lambda: _emit(emission, score, stop, tops))

    tops = jax.ShapeDtypeStruct((batch_size, 2, sizes.to_lanes(groups.count * groups.pairs)), jnp.float32)
    out, _, _ = plgpu.kernel(
        sigmoid,
        out_type=(*emit.output_types(batch_size, num_draft, groups.num_slots), tops),
        scratch_types=(scan.choose_scratch(), sync.cluster_scratch()),
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        compiler_params=emit.COMPILER_PARAMS,
    )(inputs)
    return SigmoidVerification(out.tokens, out.num_accepted, out.accept_prob[:, :num_draft], out.status)


def _score(score: Sigmoid, z: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp2((score.alpha - z) * (rows.LOG2_E / score.width)))


def _token_score(model: rows.Rows, score: Sigmoid, row: Any, token: jax.Array) -> jax.Array:
    """The score of one token; 0 if it is filtered out."""
    x, outside = rows.load_logit(model, row, token)
    scale = rows.scale_of(model)
    return jnp.where(outside | (x == -jnp.inf), 0.0, _score(score, x if scale is None else x * scale))


def _draft_score(sequence: rows.Sequence, score: Sigmoid, row: Any, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The draft's score of a drafted token, and the token if its score is 1 and all others are 0, else -1."""
    if sequence.draft is None:
        return jnp.float32(1), token
    s_q, certain = _token_score(sequence.draft, score, row, token), jnp.int32(-1)
    if sequence.draft.filter.greedy is not None:
        greedy = sequence.draft.filter.greedy[sequence.number] > 0
        s_q, certain = jnp.where(greedy, 1.0, s_q), jnp.where(greedy, token, -1)
    return s_q, certain


def _decide(emission: emit.Emission, score: Sigmoid) -> Stop:
    """Returns the `Stop` of the sequence; block 0 writes the acceptance probabilities."""
    sequence, inputs = emission.sequence, emission.sequence.inputs
    tokens = [inputs.draft_tokens[sequence.number, i] for i in range(sequence.num_draft)]
    accept = [random.accept_uniform(inputs.draws, sequence.number, jnp.int32(i)) for i in range(sequence.num_draft)]
    num_drafted, going = jnp.int32(0), jnp.bool_(True)
    for token in tokens:
        going = going & (token >= 0)
        num_drafted = num_drafted + going.astype(jnp.int32)
    # All logits are loaded before the first is needed.
    scores = [
        (_token_score(sequence.target, score, row, token), *_draft_score(sequence, score, row, token))
        for row, token in enumerate(tokens)
    ]
    stop, going = Stop(jnp.int32(0), jnp.bool_(False), jnp.int32(-1), jnp.bool_(False)), jnp.bool_(True)
    ratios = []
    for row, (s_p, s_q, certain) in enumerate(scores):
        drafted = row < num_drafted
        usable = drafted & (s_p > 0)
        ratios.append(jnp.where(usable & (s_q == s_q), jnp.minimum(s_p / s_q, 1.0), 0.0))
        accepted = going & usable & (accept[row] * s_q < s_p)
        stopped = going & drafted & ~accepted
        going = accepted
        stop = Stop(
            num_accepted=stop.num_accepted + accepted.astype(jnp.int32),
            rejecting=stop.rejecting | stopped,
            certain=jnp.where(stopped, certain, stop.certain),
            beyond=stop.beyond | (stopped & (tokens[row] >= sequence.target.vocab_size)),
        )

    @pl.when(emission.block == 0)
    def _():
        for row, ratio in enumerate(ratios):
            emission.outputs.accept_prob[sequence.number, row] = ratio

    return stop


def _scores(model: rows.Rows, score: Sigmoid, row: Any, x: jax.Array) -> tuple[jax.Array, ...]:
    """z, s(z), 1 - s(z) of `[TILE]` logits, and the mask of kept logits."""
    scale, cutoff = rows.scale_of(model), rows.cutoff_of(model, row)
    z = x.astype(jnp.float32)
    kept = z > -jnp.inf
    if cutoff is not None:
        kept = kept & (z >= cutoff)
    z = z if scale is None else z * scale
    # exp(-(z - alpha) / width), with one fused multiply-add for the exponent.
    rate = rows.LOG2_E / score.width
    below = jnp.exp2(z * -rate + score.alpha * rate)
    s = _inverse(1 + below)
    above = jnp.exp2(z * rate - score.alpha * rate)
    # The score of -inf is 0 without a mask.
    return z, s if cutoff is None else jnp.where(kept, s, 0.0), _inverse(1 + above), kept


def target_weights(
    sequence: rows.Sequence, score: Sigmoid, stop: Stop, logits: list[jax.Array], tile: tiles.Tile
) -> jax.Array:
    """Weights `[TILE]` of the target's row: s_p."""
    del tile
    return _scores(sequence.target, score, stop.num_accepted, logits[0])[1]


def residual_weights(
    sequence: rows.Sequence, score: Sigmoid, stop: Stop, logits: list[jax.Array], tile: tiles.Tile
) -> jax.Array:
    """Weights `[TILE]` of any row: max(s_p - s_q, 0) if its draft was rejected, else s_p."""
    row = stop.num_accepted
    z_p, weights, _, kept_p = _scores(sequence.target, score, row, logits[0])
    if sequence.draft is not None:
        z_q, s_q, rest_q, kept_q = _scores(sequence.draft, score, sequence.draft_row(row), logits[1])
        # For scores a and b that are close, a - b cancels; -a (1 - b) expm1((z_q - z_p) / width) does not. The exponent
        # is clipped to 0, where the residual is 0.
        exact = -weights * rest_q * _expm1(jnp.minimum((z_q - z_p) * (1 / score.width), 0.0))
        residual = jnp.maximum(jnp.where(kept_p & kept_q, exact, weights - s_q), 0.0)
        # All indices are below V and none is below 0, so `end` selects all elements or none.
        end = jnp.where(stop.rejecting & (stop.certain < 0), sequence.target.vocab_size, 0)
        weights = jnp.where(tile.indices() < end, residual, weights)
    # s_q is 1 at `stop.certain`, so the residual is 0 there.
    return jnp.where(tile.indices() == jnp.where(stop.rejecting, stop.certain, -1), 0.0, weights)


def _sum_tiles(emission: emit.Emission, score: Sigmoid, stop: Stop, tops: Any, weights_fn: Any):
    """Writes this block's share of the tile sums of the row that emits."""
    is_target = weights_fn is target_weights
    sources = (emit.target_source if is_target else emit.all_sources)(emission, stop.num_accepted)
    fn = functools.partial(weights_fn, emission.sequence, score, stop)
    count = emit.groups_of(emission, sources)
    emit.share(emission, count, lambda group: _sum_group(emission, sources, fn, tops, group))


def _sum_group(emission: emit.Emission, sources: emit.Sources, weights_fn: Any, tops: Any, group: Any):
    """Writes the tile sums of one group, and the largest logit of each source in it (NaN if it holds NaN)."""
    read = emit.read_group(emission, sources, group)
    for slot, logits in enumerate(zip(*(loaded for _, loaded in read), strict=True)):
        # Only the last tile holds logits of other rows; a tile before the first has logits of this row.
        *whole, end = logits
        largest = functools.reduce(jnp.maximum, whole, tiles.mask_tile(end, read[-1][0], -jnp.inf))
        top = jnp.max(largest.astype(jnp.float32))
        copies = 1 if len(sources) == 2 else emission.groups.pairs
        for i in range(copies):
            tops[emission.sequence.number, slot, group * copies + i] = top
    emit.write_sums(emission, group, [weights_fn(logits, tile) for tile, logits in read], read)


def _largest(emission: emit.Emission, tops: Any, slot: int) -> jax.Array:
    """The largest logit of a source's row; not finite if the row holds NaN or +inf, or is all -inf."""
    index, count = (emission.sequence.number, slot), emission.groups.count * emission.groups.pairs
    return jnp.max(tiles.load_first_lanes(tops, index, count, -jnp.inf))


def _has_scores(model: rows.Rows, score: Sigmoid, largest: jax.Array) -> jax.Array:
    """Whether the row has a positive score, that of its largest logit: all may underflow."""
    scale = rows.scale_of(model)
    return _score(score, largest if scale is None else largest * scale) > 0


def _emit(emission: emit.Emission, score: Sigmoid, stop: Stop, tops: Any):
    """Emits the last token of the sequence."""
    sequence, row = emission.sequence, stop.num_accepted
    largest = _largest(emission, tops, 0)
    degenerate = ~(rows.is_finite(largest) & _has_scores(sequence.target, score, largest))
    distrusted = stop.beyond
    if sequence.draft is not None:
        distrusted = distrusted | (stop.rejecting & ~rows.is_finite(_largest(emission, tops, 1)))

    @pl.when(degenerate)
    def _():
        token = rows.first_largest_number(sequence.target, row)
        emit.write_last(emission, row, token, True, distrusted, False)

    @pl.when(~degenerate)
    def _():
        number, total = emit.choose_tile(emission)
        empty = total == 0
        from_target = empty | distrusted

        def choose_target_tile():
            weights_fn = functools.partial(target_weights, sequence, score, stop)
            sources = emit.target_source(emission, row)
            emit.sum_alone(emission, lambda group: _sum_group(emission, sources, weights_fn, tops, group))
            return emit.choose_tile(emission)[0]

        number = lax.cond(from_target, choose_target_tile, lambda: number)
        drawn = stop._replace(rejecting=stop.rejecting & ~from_target)
        weights_fn = functools.partial(residual_weights, sequence, score, drawn)
        token = emit.choose_token(emission, emit.all_sources(emission, row), weights_fn, number)
        emit.write_last(emission, row, token, False, distrusted, empty & stop.rejecting & ~distrusted)


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x for x from 1 to infinity, with an error of about 3e-7: the square of the hardware's rsqrt."""
    root = lax.rsqrt(x)
    return root * root


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1 in float32; for |x| < 0.1, where the subtraction cancels, by a series of relative error 1e-8."""
    series = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5)))))
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.exp2(x * rows.LOG2_E) - 1)
