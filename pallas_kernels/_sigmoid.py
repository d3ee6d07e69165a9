"""The sigmoid rule in one launch: gathers, then one pair of rows a sequence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _rows as rows
from pallas_kernels import _token as token_rule
from pallas_kernels._launch import Filter, launch, make_operands


class SigmoidResult(NamedTuple):
    """What the sigmoid rule decides for B sequences.

    Attributes:
      num_accepted: How many drafts were accepted.
      token: The residual or bonus token.
      accept_prob: min(1, s_p/s_q) of each drafted token, 0 where s_p is.
      degenerate_target: Whether the emitting target row holds NaN or +inf, or nothing above -inf.
      degenerate_draft: The same of the draft's row that a draft was rejected at.
      empty_residual: Whether a draft was rejected where max(s_p - s_q, 0) is zero to the last bit.
    """

    num_accepted: Int[Array, "B"]
    token: Int[Array, "B"]
    accept_prob: Float[Array, "B K"]
    degenerate_target: Bool[Array, "B"]
    degenerate_draft: Bool[Array, "B"]
    empty_residual: Bool[Array, "B"]


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    tokens: Int[Array, "B K"],
    num_drafted: Int[Array, "B"],
    accept_uniforms: Float[Array, "B K"],
    uniforms: Float[Array, "B 2"],
    *,
    alpha: float,
    beta: float,
) -> SigmoidResult:
    """The sigmoid rule of Wagner et al. (2024, arXiv 2406.11016) on a GPU, Hopper or newer.

    Accepts drafts while `u * s_q < s_p`, which reads one logit a row; then reads the row that emits, and the
    draft's at a rejection. Target rows are never greedy here: the first largest logit of all rows would have
    to be found. Types and shapes as in `verify_token`.
    """
    if target_filter.greedy is not None:
        raise NotImplementedError("the sigmoid kernel takes no greedy target rows")
    operands = make_operands(
        target_logits, target_filter, draft_logits, draft_filter, None, tokens, num_drafted, accept_uniforms, uniforms
    )
    sequence_type = functools.partial(_Sequence, alpha=float(alpha), beta=float(beta))
    out = launch(sequence_type, operands, target_logits.shape)
    ints = out.ints
    return SigmoidResult(
        num_accepted=ints[:, 0],
        token=ints[:, 1],
        accept_prob=out.log_ratios[:, : tokens.shape[1]],
        degenerate_target=ints[:, 2] > 0,
        degenerate_draft=ints[:, 3] > 0,
        empty_residual=ints[:, 4] > 0,
    )


class _State(NamedTuple):
    """`going` while all drafts so far were accepted; `certain` is the draft's token where q is one at it."""

    going: jax.Array
    num_accepted: jax.Array
    rejecting: jax.Array
    certain: jax.Array


class _Sequence(token_rule.Sequence):
    """The body of the kernel, as one block of the cluster of one sequence runs it."""

    def __init__(self, *args, alpha, beta):
        super().__init__(*args, largest_normalizer=0.0)
        self.alpha, self.width = alpha, beta - alpha

    def run(self):
        start = _State(jnp.bool_(True), jnp.int32(0), jnp.bool_(False), jnp.int32(-1))
        state = lax.fori_loop(0, self.num_drafted, self._decide, start) if self.num_draft else start
        self._write_sums(state)
        self._meet()
        pl.when(self.block == 0)(lambda: self._finish(state))

    def _sigmoid(self, t):
        return 1 / (1 + jnp.exp2(-t * rows.LOG2_E))

    def _token_score(self, of, row, token):
        """The score of one token; 0 where it is filtered out."""
        ref = getattr(self.inputs, of)
        scale, cutoff = self._filter(of, row)
        outside = (token < 0) | (token >= self.vocab_size)
        x = ref[self._row(of, row) * self.vocab_size + jnp.where(outside, 0, token)].astype(jnp.float32)
        if cutoff is not None:
            outside = outside | (x < cutoff)
        z = x if scale is None else x * scale
        return jnp.where(outside | (x == -jnp.inf), 0.0, self._sigmoid((z - self.alpha) / self.width))

    def _decide(self, row, state):
        inputs = self.inputs
        token, certain = inputs.tokens[self.sequence, row], jnp.int32(-1)
        s_p = self._token_score("target", row, token)
        if inputs.draft is None:
            s_q, certain = jnp.float32(1), token
        else:
            s_q = self._token_score("draft", row, token)
            if inputs.draft_greedy is not None:
                greedy = inputs.draft_greedy[self.sequence] > 0
                s_q, certain = jnp.where(greedy, 1.0, s_q), jnp.where(greedy, token, -1)
        usable = s_p > 0

        @pl.when(self.block == 0)
        def _():
            ratio = jnp.where(usable & (s_q == s_q), jnp.minimum(s_p / s_q, 1.0), 0.0)
            self.results.log_ratios[self.sequence, row] = ratio

        accepted = state.going & usable & (inputs.log_uniforms[self.sequence, row] * s_q < s_p)
        return _State(
            going=accepted,
            num_accepted=state.num_accepted + accepted.astype(jnp.int32),
            rejecting=jnp.where(state.going, ~accepted, state.rejecting),
            certain=jnp.where(state.going & ~accepted, certain, state.certain),
        )

    def _scores(self, x, row_filter):
        """z, the scores of [TILE] logits, and the scores of what they are less than one."""
        scale, cutoff = row_filter
        z = x if scale is None else x * scale
        score = self._sigmoid((z - self.alpha) / self.width)
        rest = self._sigmoid((self.alpha - z) / self.width)
        kept = x > -jnp.inf
        if cutoff is not None:
            kept = kept & (x >= cutoff)
        return z, jnp.where(kept, score, 0.0), rest, kept

    def _load(self, state, tile_number, has_q):
        """[TILE] logits of the emitting row, and of the draft's at a rejection."""
        row = state.num_accepted
        at = jnp.minimum(row, max(self.num_draft - 1, 0))
        p_row, q_row = self._row("target", row), self._row("draft", at)
        places = [(self.inputs.target, p_row), (self.inputs.draft, q_row)]
        tile = rows.tile_at(tile_number, self.vocab_size, places[: 1 + has_q])
        x_p = rows.load_tile(self.inputs.target, self.vocab_size, p_row, tile)
        x_q = rows.load_tile(self.inputs.draft, self.vocab_size, q_row, tile) if has_q else None
        return x_p, x_q, tile, at

    def _weights(self, state, tile_number, target_only=False):
        weights, tile, _, _ = self._weights_and_logits(state, tile_number, target_only)
        return weights, tile

    def _weights_and_logits(self, state, tile_number, target_only):
        has_q = self.inputs.draft is not None and not target_only
        x_p, x_q, tile, at = self._load(state, tile_number, has_q)
        z_p, weights, _, kept_p = self._scores(x_p, self._filter("target", state.num_accepted))
        if x_q is not None:
            z_q, score_q, rest_q, kept_q = self._scores(x_q, self._filter("draft", at))
            # Of two sigmoids that are close, a - b loses digits; -a (1 - b) expm1(z_q - z_p) does not.
            exact = -weights * rest_q * _expm1((z_q - z_p) * (1 / self.width))
            residual = jnp.maximum(jnp.where(kept_p & kept_q, exact, weights - score_q), 0.0)
            until = jnp.where(state.rejecting & (state.certain < 0), self.vocab_size, 0)
            weights = jnp.where(tile.place < until, residual, weights)
        if not target_only:
            # The draft is certain of a token, and scores one there: no more than that is left of p.
            without = jnp.where(state.rejecting, state.certain, -1)
            weights = jnp.where(tile.place == without, 0.0, weights)
        return jnp.where(tile.inside, weights, 0.0), tile, x_p, x_q

    def _write_sums(self, state):
        """This block's share of the tile sums, and the largest logits on the way: NaN where there is one."""
        out, cluster = self.results, self.chosen.cluster
        num_sums = out.sums.shape[1]
        has_q = self.inputs.draft is not None

        def one(i, carry):
            number = self.block + i * cluster
            weights, tile, x_p, x_q = self._weights_and_logits(state, number, target_only=False)
            out.sums[self.sequence, number] = jnp.sum(weights)
            found = [x_p, x_q][: 1 + has_q]
            return tuple(
                jnp.maximum(top, jnp.max(jnp.where(tile.inside, x, -jnp.inf)))
                for top, x in zip(carry, found, strict=True)
            )

        init = (jnp.float32(-jnp.inf),) * (1 + has_q)
        tops = lax.fori_loop(0, (num_sums - self.block + cluster - 1) // cluster, one, init)
        for slot, top in enumerate(tops):
            out.largest[self.sequence, slot, self.block] = top

    def _finish(self, state):
        out, sequence = self.results, self.sequence

        def infinite(slot):
            count = range(self.chosen.cluster)
            top = functools.reduce(jnp.maximum, [out.largest[sequence, slot, i] for i in count])
            return ~(jnp.abs(top) < jnp.inf)

        degenerate = infinite(0)
        distrusted = jnp.bool_(False)
        if self.inputs.draft is not None:
            distrusted = state.rejecting & infinite(1)
        out.ints[sequence, 0] = state.num_accepted
        out.ints[sequence, 2] = degenerate.astype(jnp.int32)
        out.ints[sequence, 3] = distrusted.astype(jnp.int32)

        @pl.when(~degenerate)
        def _():
            token, empty = self._sample(state, distrusted)
            out.ints[sequence, 1] = token
            out.ints[sequence, 4] = (empty & state.rejecting & ~distrusted).astype(jnp.int32)

        @pl.when(degenerate)
        def _():
            row = self._row("target", state.num_accepted)
            _, first, _ = rows.first_largest_share(self.inputs.target, self.vocab_size, row, jnp.int32(0), 1)
            out.ints[sequence, 1] = jnp.where(first < self.vocab_size, first, 0)
            out.ints[sequence, 4] = jnp.int32(0)


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1, to float32: by its series below 0.1 (what is left out is 1e-8 of it), where exp has no digits."""
    series = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5)))))
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.exp2(x * rows.LOG2_E) - 1)
