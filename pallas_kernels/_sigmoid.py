"""The sigmoid rule in one launch: gathers, then one pair of rows a sequence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _config as config
from pallas_kernels import _launch as launching
from pallas_kernels import _rows as rows
from pallas_kernels import _sums as summing
from pallas_kernels._emission import Emission, groups_of
from pallas_kernels._launch import make_operands
from pallas_kernels.types import Filter, SigmoidVerification, Uniforms


def verify_sigmoid(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    tokens: Int[Array, "B K"],
    uniforms: Uniforms,
    *,
    alpha: float,
    beta: float,
) -> SigmoidVerification:
    """The sigmoid rule of Wagner et al. (2024, arXiv 2406.11016) on a GPU, Hopper or newer.

    Accepts drafts while `uniforms.accept * s_q < s_p`, which reads one logit a row; then reads the row that emits, and
    the draft's at a rejection. Target rows are never greedy here: the first largest logit of all rows would
    have to be found. Types and shapes as in `verify_token`.
    """
    if target_filter.greedy is not None:
        raise NotImplementedError("the sigmoid kernel takes no greedy target rows")
    batch_size, num_rows, vocab_size = target_logits.shape
    num_draft = num_rows - 1
    operands = make_operands(target_logits, target_filter, draft_logits, draft_filter, None, tokens, uniforms)
    chosen = config.choose_sigmoid(batch_size, vocab_size)
    groups = groups_of(operands, vocab_size, chosen)
    results = launching.results(batch_size, num_draft, groups.num_slots)
    tops = jax.ShapeDtypeStruct((batch_size, 2, config.in_lanes(groups.count * groups.pairs)), jnp.float32)

    def body(operands, made, room, barrier):
        out, tops = made
        place = room, barrier, vocab_size, groups, chosen.blocks
        _Sigmoid(operands, out, *place, tops=tops, alpha=alpha, beta=beta).run()

    room = launching.room_to_search(groups.num_slots)
    out, _ = launching.launch(body, operands, (results, tops), {"sequence": batch_size}, chosen.blocks, room)
    return SigmoidVerification(out.tokens, out.num_accepted, out.accept_prob[:, :num_draft], out.status)


class _State(NamedTuple):
    """`going` while all drafts so far were accepted; `certain` is the draft's token where q is one at it."""

    going: jax.Array
    num_accepted: jax.Array
    rejecting: jax.Array
    certain: jax.Array


class _Sigmoid(Emission):
    """One sequence under the sigmoid rule; `tops` are the largest logits of groups of tiles of both rows."""

    def __init__(self, inputs, results, *place, tops, alpha, beta):
        super().__init__(inputs, results, *place)
        self.tops = tops
        self.alpha, self.width = float(alpha), float(beta - alpha)
        self.has_draft = inputs.draft is not None

    def run(self):
        summing.clear_before(self.room)
        state = self._decide()
        self.sum_tiles(state)
        emits = self.meet()
        self.write_drafts(state.num_accepted, lambda i: self.inputs.tokens[self.sequence, i], lambda i: None)
        pl.when(emits)(lambda: self._finish(state))

    def _score(self, z):
        return 1 / (1 + jnp.exp2((self.alpha - z) * (rows.LOG2_E / self.width)))

    def _token_score(self, of, row, token):
        """The score of one token; 0 where it is filtered out."""
        x, outside = self.logit(of, row, token)
        scale, _ = self.filter(of, row)
        return jnp.where(outside | (x == -jnp.inf), 0.0, self._score(x if scale is None else x * scale))

    def _decide(self):
        state = _State(jnp.bool_(True), jnp.int32(0), jnp.bool_(False), jnp.int32(-1))
        tokens = [self.inputs.tokens[self.sequence, i] for i in range(self.num_draft)]
        accept = [self.inputs.accept[self.sequence, i] for i in range(self.num_draft)]
        num_drafted, counting = jnp.int32(0), jnp.bool_(True)
        for token in tokens:
            counting = counting & (token >= 0)
            num_drafted = num_drafted + counting.astype(jnp.int32)
        # All logits are asked for before the first is needed.
        scores = [self._scores_of(row, token) for row, token in enumerate(tokens)]
        ratios = []
        for row, (s_p, s_q, certain) in enumerate(scores):
            drafted = row < num_drafted
            usable = drafted & (s_p > 0)
            ratios.append(jnp.where(usable & (s_q == s_q), jnp.minimum(s_p / s_q, 1.0), 0.0))
            accepted = state.going & usable & (accept[row] * s_q < s_p)
            stopped = state.going & drafted & ~accepted
            state = _State(
                going=accepted,
                num_accepted=state.num_accepted + accepted.astype(jnp.int32),
                rejecting=state.rejecting | stopped,
                certain=jnp.where(stopped, certain, state.certain),
            )
        pl.when(self.block == 0)(lambda: self._write_ratios(ratios))
        return state

    def _scores_of(self, row, token):
        """The scores of a drafted token, and the token where the draft is certain of it, else -1."""
        s_p = self._token_score("target", row, token)
        if not self.has_draft:
            return s_p, jnp.float32(1), token
        s_q, certain = self._token_score("draft", row, token), jnp.int32(-1)
        if self.inputs.draft_greedy is not None:
            greedy = self.inputs.draft_greedy[self.sequence] > 0
            s_q, certain = jnp.where(greedy, 1.0, s_q), jnp.where(greedy, token, -1)
        return s_p, s_q, certain

    def _write_ratios(self, ratios):
        for row, ratio in enumerate(ratios):
            self.results.accept_prob[self.sequence, row] = ratio

    def _scores(self, x, row_filter):
        """z, the scores of [TILE] logits, what they are less than one, and which are kept."""
        scale, cutoff = row_filter
        z = x.astype(jnp.float32)
        kept = z > -jnp.inf
        if cutoff is not None:
            kept = kept & (z >= cutoff)
        z = z if scale is None else z * scale
        # exp(-(z - alpha) / width), whose exponent is one multiplication and addition.
        rate = rows.LOG2_E / self.width
        below = jnp.exp2(z * -rate + self.alpha * rate)
        score = _inverse(1 + below)
        above = jnp.exp2(z * rate - self.alpha * rate)
        # Minus infinity scores 0 as it is.
        return z, score if cutoff is None else jnp.where(kept, score, 0.0), _inverse(1 + above), kept

    def weights(self, state, loaded, tile, rejecting):
        """[TILE] weights of the emitting row: max(s_p - s_q, 0) where a draft was rejected, else s_p."""
        row = state.num_accepted
        z_p, weights, _, kept_p = self._scores(loaded[0], self.filter("target", row))
        if rejecting is False:
            return weights
        if self.has_draft:
            z_q, score_q, rest_q, kept_q = self._scores(loaded[1], self.filter("draft", self.draft_row(row)))
            # Of two sigmoids that are close, a - b loses digits; -a (1 - b) expm1(z_q - z_p) does not.
            # Nothing is left where q is larger.
            exact = -weights * rest_q * _expm1(jnp.minimum((z_q - z_p) * (1 / self.width), 0.0))
            residual = jnp.maximum(jnp.where(kept_p & kept_q, exact, weights - score_q), 0.0)
            # A number that no place reaches, or that all do.
            until = jnp.where(state.rejecting & (state.certain < 0), self.vocab_size, 0)
            weights = jnp.where(tile.place() < until, residual, weights)
        # The draft is certain of a token, and scores one there: no more than that is left of p.
        without = jnp.where(state.rejecting, state.certain, -1)
        return jnp.where(tile.place() == without, 0.0, weights)

    def sum_group(self, state, group, rejecting):
        """Reads the tiles of one group, and writes their sums, and the largest logit on the way: NaN where one is."""
        read = self.read_group(state.num_accepted, group, self.reads_draft(rejecting))
        tiles = [tile for tile, _ in read]
        for slot, logits in enumerate(zip(*(loaded for _, loaded in read), strict=True)):
            # Of the last tile no more than belongs to the row. A tile before the first has logits of the row too.
            *whole, end = logits
            largest = functools.reduce(jnp.maximum, whole, rows.only_inside(end, tiles[-1], -jnp.inf))
            top = jnp.max(largest.astype(jnp.float32))
            same = 1 if self.reads_draft(rejecting) else self.groups.pairs
            for i in range(same):
                self.tops[self.sequence, slot, group * same + i] = top
        weights = [self.weights(state, loaded, tile, rejecting) for tile, loaded in read]
        self.write_sums(group, weights, tiles)

    def _is_degenerate(self, slot):
        top = jnp.max(
            self.first_lanes(self.tops, (self.sequence, slot), self.groups.count * self.groups.pairs, -jnp.inf)
        )
        return ~(jnp.abs(top) < jnp.inf)

    def _finish(self, state):
        degenerate = self._is_degenerate(0)
        distrusted = state.rejecting & self._is_degenerate(1) if self.has_draft else jnp.bool_(False)
        write = functools.partial(self.write_last, state.num_accepted)

        @pl.when(degenerate)
        def _():
            write(self.first_number(state.num_accepted), (True, distrusted, False))

        @pl.when(~degenerate)
        def _():
            number, total = self.choose_tile()
            empty = total == 0
            alone = empty | distrusted

            def again():
                self.sum_target_tiles(state)
                return self.choose_tile()[0]

            number = lax.cond(alone, again, lambda: number)
            token = self.choose_token(state._replace(rejecting=state.rejecting & ~alone), number)
            write(token, (False, distrusted, empty & state.rejecting & ~distrusted))


def _inverse(x: jax.Array) -> jax.Array:
    """1 / x of x from 1 to infinity, to about 3e-7: the square of the hardware's inverse root, for one instruction."""
    root = lax.rsqrt(x)
    return root * root


def _expm1(x: jax.Array) -> jax.Array:
    """exp(x) - 1, to float32: by its series below 0.1 (what is left out is 1e-8 of it), where exp has no digits."""
    series = x * (1 + x * (1 / 2) * (1 + x * (1 / 3) * (1 + x * (1 / 4) * (1 + x * (1 / 5)))))
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.exp2(x * rows.LOG2_E) - 1)
