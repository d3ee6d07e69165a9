"""The token rule on one sequence: what is known of chunks put together, acceptance, and the weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._emission import Emission
from pallas_kernels._launch import Flags, Partials, fence


class _Normalized(NamedTuple):
    """A row after its chunks are put together. `certain` is -1, or the token that has all probability."""

    offset: jax.Array
    log_sum: jax.Array
    certain: jax.Array
    degenerate: jax.Array


class _State(NamedTuple):
    """Where a sequence stands: `going` while all drafts so far were accepted."""

    going: jax.Array
    num_accepted: jax.Array
    p: _Normalized
    q: _Normalized
    rejecting: jax.Array
    degenerate_target: jax.Array
    degenerate_draft: jax.Array


class Decision(Emission):
    """One sequence under the token rule.

    Attributes:
      known: What is known of the chunks of the target's rows, and of the draft's.
    """

    def __init__(self, inputs, results, barrier, vocab_size, cluster, known, *, largest_normalizer, flags: Flags):
        super().__init__(inputs, results, barrier, vocab_size, cluster)
        self.known: dict[str, Partials] = dict(zip(("target", "draft"), known, strict=True))
        self.largest_normalizer, self.flags = largest_normalizer, flags
        cut = config.chunks(inputs.target.dtype, vocab_size)
        # Where the first reading's chunks are spans of tiles, p need not be read again.
        self.spans_known = cut.tiles == self.span

    def emit(self):
        """Decides, after all target rows were read, and those of a draft without normalizers."""
        self.drafted, self.num_drafted = self.tokens()
        if self.inputs.draft is not None and self.inputs.normalizers is not None:
            self._read_unusable()
        state = self._start()
        for row in range(self.num_draft + 1):
            state = self._decide(row, state, row <= self.num_drafted)
        self._emit(state)

    def read_and_emit(self):
        """Reads row after row, and decides on each, up to the first rejection. Rows after it keep a ratio of zero."""
        self.drafted, self.num_drafted = self.tokens()

        @pl.when(self.block == 0)
        def _():
            for row in range(self.num_draft):
                self.results.log_probs[self.sequence, row] = jnp.float32(0)
                self.results.accept_prob[self.sequence, row] = jnp.float32(0)

        def body(carry):
            row, state = carry
            self.share(self.num_chunks("target"), lambda chunk: self.read("target", row, chunk, self.known["target"]))
            if self.inputs.draft is not None:
                at = self.draft_row(row)
                wanted = row < self.num_drafted
                if self.inputs.normalizers is not None:
                    wanted = wanted & ~self._is_usable(at)
                pl.when(wanted)(lambda: self._read_draft(at))
            self.meet()
            return row + 1, self._decide(row, state, row <= self.num_drafted)

        def wanted(carry):
            row, state = carry
            return state.going & (row <= self.num_drafted)

        self._emit(lax.while_loop(wanted, body, (jnp.int32(0), self._start()))[1])

    def _read_draft(self, row):
        self.share(self.num_chunks("draft"), lambda chunk: self.read("draft", row, chunk, self.known["draft"]))

    def _is_usable(self, row):
        """Whether a normalizer that was handed over is a number, and precise enough to be subtracted."""
        return jnp.abs(self.inputs.normalizers[self.sequence, row]) <= self.largest_normalizer

    def _read_unusable(self):
        """The draft's rows whose normalizers cannot be used, which is rare."""
        unusable = [(row < self.num_drafted) & ~self._is_usable(row) for row in range(self.num_draft)]
        any_unusable = unusable[0]
        for one in unusable[1:]:
            any_unusable = any_unusable | one

        @pl.when(any_unusable)
        def _():
            for row, wanted in enumerate(unusable):
                pl.when(wanted)(lambda row=row: self._read_draft(row))
            self.meet()

    # Deciding: every block the same, from the same numbers.

    def _together(self, of, row, count=None):
        """Maximum and logarithm of the sum of a row's first chunks, or of all; and each one's share of the sum."""
        known, at = self.known[of], (self.sequence, row)
        count = self.num_chunks(of) if count is None else count
        tops = self.lanes(known.top, at, count, rows.LOWEST)
        totals = self.lanes(known.total, at, count, 0.0)
        scale, _ = self.filter(of, row)
        top = jnp.max(tops)
        weights = totals * jnp.exp2((tops - top) * (rows.LOG2_E if scale is None else scale * rows.LOG2_E))
        return top, jnp.log(jnp.sum(weights)), weights

    def _target(self, row):
        top, log_sum, _ = self._together("target", row)
        certain = jnp.int32(-1)
        if self.inputs.target_greedy is not None:
            greedy = self.inputs.target_greedy[self.sequence] > 0
            at, count = (self.sequence, row), self.num_chunks("target")
            tops = self.lanes(self.known["target"].top, at, count, -jnp.inf)
            firsts = self.lanes(self.known["target"].first, at, count, rows.NOWHERE)
            first = jnp.min(jnp.where(tops == top, firsts, rows.NOWHERE))
            certain = jnp.where(greedy, first, -1)
            log_sum = jnp.where(greedy, 0.0, log_sum)
        # Of a greedy row, minus infinity everywhere leaves the neutral element.
        degenerate = ~(jnp.abs(top + log_sum) < jnp.inf) | (top <= rows.LOWEST)
        return _Normalized(top, log_sum, jnp.where(degenerate, -1, certain), degenerate)

    def _draft(self, row):
        """The draft's row; read at most where the drafter did not hand over its normalizers."""
        inputs, token = self.inputs, self._token(row)
        if inputs.draft is None:
            return _Normalized(jnp.float32(0), jnp.float32(0), token, jnp.bool_(False))

        def read():
            return self._together("draft", row)[:2]

        if inputs.normalizers is None:
            top, log_sum = read()
        else:
            normalizer = inputs.normalizers[self.sequence, row]
            top, log_sum = lax.cond(self._is_usable(row), lambda: (jnp.float32(0), normalizer), read)
        certain = jnp.int32(-1)
        if inputs.draft_greedy is not None:
            certain = jnp.where(inputs.draft_greedy[self.sequence] > 0, token, -1)
        return _Normalized(top, log_sum, certain, ~(jnp.abs(top + log_sum) < jnp.inf))

    def _token(self, row):
        return self.drafted[row] if isinstance(row, int) else self.inputs.tokens[self.sequence, row]

    def _log_prob(self, of, row, token, normalized):
        """log-probability of one token; -inf where it has none."""
        value = certain = jnp.where(normalized.certain == token, 0.0, -jnp.inf)
        if getattr(self.inputs, of) is not None:
            x, outside = self.logit(of, row, token)
            scale, _ = self.filter(of, row)
            value = x - normalized.offset
            value = (value if scale is None else value * scale) - normalized.log_sum
            value = jnp.where(normalized.certain < 0, jnp.where(outside, -jnp.inf, value), certain)
        return jnp.where(normalized.degenerate, -jnp.inf, jnp.minimum(value, 0.0))

    def _start(self):
        nothing = _Normalized(jnp.float32(0), jnp.float32(0), jnp.int32(-1), jnp.bool_(False))
        no = jnp.bool_(False)
        return _State(jnp.bool_(True), jnp.int32(0), nothing, nothing, no, no, no)

    def _decide(self, row, state, read):
        """One more row, if it was read: its draft accepted or not, while `going`; its probabilities in any case."""
        p, going = self._target(row), state.going & read

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(going, a, b), new, old)

        state = state._replace(p=keep(p, state.p), degenerate_target=state.degenerate_target | (going & p.degenerate))
        if isinstance(row, int) and row == self.num_draft:
            return state
        drafted, at = row < self.num_drafted, row if isinstance(row, int) else self.draft_row(row)
        q, token = self._draft(at), self._token(at)
        log_p, log_q = self._log_prob("target", row, token, p), self._log_prob("draft", at, token, q)
        # A token that q cannot have given says nothing, like one from a degenerate row.
        trusted = drafted & (log_q > -jnp.inf)
        usable = trusted & (log_p > -jnp.inf)
        log_ratio = jnp.where(usable, log_p - log_q, -jnp.inf)
        accepted = going & usable & (jnp.log(self.inputs.accept[self.sequence, at]) < log_ratio)

        @pl.when(self.block == 0)
        def _():
            self.results.log_probs[self.sequence, row] = jnp.where(accepted, log_p, 0.0)

            @pl.when(row < self.num_draft)
            def _():
                self.results.accept_prob[self.sequence, row] = jnp.exp(jnp.minimum(log_ratio, 0.0))

        return _State(
            going=accepted,
            num_accepted=state.num_accepted + accepted.astype(jnp.int32),
            p=state.p,
            q=keep(q, state.q),
            rejecting=jnp.where(going, trusted & ~accepted, state.rejecting),
            degenerate_target=state.degenerate_target,
            degenerate_draft=state.degenerate_draft | (going & drafted & ~trusted),
        )

    # Emitting: the weights of one row.

    def weights(self, state, number, target_only=False):
        """[TILE] weights of the emitting row: max(p - q, 0) where a draft was rejected, else p."""
        row = state.num_accepted
        has_q = self.inputs.draft is not None and not target_only
        loaded, tile = self.load_tile(row, number, has_q)
        weights = rows.prob(loaded[0], rows.Row(state.p.offset, state.p.log_sum, *self.filter("target", row)))
        if has_q:
            of_draft = self.filter("draft", self.draft_row(row))
            q = rows.prob(loaded[1], rows.Row(state.q.offset, state.q.log_sum, *of_draft))
            # Of no element, where no draft was rejected or q is certain of its token.
            until = jnp.where(state.rejecting & (state.q.certain < 0), self.vocab_size, 0)
            weights = jnp.maximum(weights - jnp.where(tile.place < until, q, 0.0), 0.0)
        if not target_only:
            # q is one at a certain token, and p no more than that.
            without = jnp.where(state.rejecting, state.q.certain, -1)
            weights = jnp.where(tile.place == without, 0.0, weights)
        return jnp.where(tile.inside, weights, 0.0), tile

    def _emit(self, state):
        sampled = ~state.p.degenerate & (state.p.certain < 0)
        reread = sampled & (state.rejecting if self.spans_known else jnp.bool_(True))

        @pl.when(reread)
        def _():
            self.share(self.num_sums, lambda number: self.sum_span(state, number))
            self.meet()

        pl.when(sampled & (self.block == 0))(lambda: self._emit_sampled(state))
        pl.when(~sampled & (self.block == 0))(lambda: self._emit_certain(state))

    def _emit_sampled(self, state):
        empty = jnp.bool_(False)
        if self.num_draft:
            empty = state.rejecting & (jnp.sum(self.sums(self.num_sums)) == 0)
        alone = ~state.rejecting | empty
        if self.spans_known:
            # Of p alone the first reading tells as much: its chunks are spans of tiles.
            _, log_sum, weights = self._together("target", state.num_accepted, jnp.where(alone, self.num_sums, 0))
            sums = weights * jnp.where(alone, jnp.exp2(-log_sum * rows.LOG2_E), 0.0)
            if self.num_draft:
                sums = sums + self.sums(jnp.where(alone, 0, self.num_sums))
        else:

            @pl.when(empty)
            def _():
                lax.fori_loop(0, self.num_sums, lambda i, c: (self.sum_span(state, i, True), c)[1], jnp.int32(0))
                fence()

            sums = self.sums(self.num_sums)
        token = self.sample(state._replace(rejecting=state.rejecting & ~empty), sums)
        log_prob = self._log_prob("target", state.num_accepted, token, state.p)
        self._write(state, token, log_prob, empty)

    def _emit_certain(self, state):
        row, degenerate = state.num_accepted, state.p.degenerate
        first = lax.cond(degenerate, lambda: self.first_number(row), lambda: jnp.int32(0))
        token = jnp.where(degenerate, first, state.p.certain)
        # All of the residual is where the draft left something of the one certain token.
        left = jnp.bool_(True)
        if self.num_draft:
            left = self._log_prob("draft", self.draft_row(row), state.p.certain, state.q) < 0
        log_prob = jnp.where(degenerate, -jnp.inf, 0.0)
        self._write(state, token, log_prob, state.rejecting & ~degenerate & ~left)

    def _write(self, state, token, log_prob, empty):
        flags = zip(self.flags, (state.degenerate_target, state.degenerate_draft, empty), strict=True)
        status = sum((jnp.where(holds, flag, 0) for flag, holds in flags), jnp.int32(0))
        self.write(state.num_accepted, self.drafted, token, status)
        # What was accepted before it stands there already, and nothing behind it, up to the last place.
        self.results.log_probs[self.sequence, self.num_draft] = jnp.float32(0)
        self.results.log_probs[self.sequence, state.num_accepted] = log_prob
