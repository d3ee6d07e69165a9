"""The token rule on one sequence: acceptance, all rows at once, a row a thread; then the weights of one row."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._emission import Emission
from pallas_kernels._launch import Flags, Known, Tables, fence

LAYOUT = plgpu.Layout.WG_STRIDED((config.THREADS,), vec_size=1)


class _State(NamedTuple):
    """The row that emits. A distribution is `certain` of a token, or of none, -1."""

    num_accepted: jax.Array
    rejecting: jax.Array
    distrusted: jax.Array
    degenerate: jax.Array
    p_offset: jax.Array
    p_log_sum: jax.Array
    p_certain: jax.Array
    q_offset: jax.Array
    q_log_sum: jax.Array
    q_certain: jax.Array


class Decision(Emission):
    """One sequence under the token rule.

    Attributes:
      known: What is known of the rows.
      tables: Where a block writes one number a row, to read it by the row's number.
    """

    def __init__(
        self, inputs, results, *place: Any, known: Known, tables: Tables, largest_normalizer: float, flags: Flags
    ):
        super().__init__(inputs, results, *place)
        self.known, self.tables = known, tables
        self.largest_normalizer, self.flags = largest_normalizer, Flags(*flags)

    def emit(self):
        """Decides, after all target rows were read, and those of a draft without normalizers."""
        if self.inputs.normalizers is not None:
            self._read_unusable()
        numbers, accepted, num_drafted = self._judge()
        self._emit(self._settle(numbers, self._first_without(accepted), num_drafted))

    def read_and_emit(self):
        """Reads row after row, and decides on each, up to the first rejection.

        What is known of chunks has two copies, and a row takes the one that the row before it did not: a block that
        is ahead writes in neither line that another may still be reading.
        """
        if self.num_draft:
            self.share(self.num_draft, lambda row: self.look_up(row, self.known.facts))
        lane = self._lane()

        def body(carry):
            row, _, _, numbers = carry
            copy = row % 2
            self.share(
                self.num_chunks("target"), lambda chunk: self.read("target", row, chunk, self.known.target, copy)
            )
            if self.inputs.draft is not None:
                at = self.draft_row(row)
                wanted = (row < self.num_draft) & (self.inputs.tokens[self.sequence, at] >= 0)
                if self.inputs.normalizers is not None:
                    wanted = wanted & ~self._is_usable(self.inputs.normalizers[self.sequence, at])
                pl.when(wanted)(lambda: self._read_draft(at, copy))
            self.meet()
            new, accepted, num_drafted = self._judge(copy)
            numbers = jax.tree.map(lambda ours, before: jnp.where(lane == row, ours, before), new, numbers)
            # The rows before were accepted, or this one were not read.
            accepted = (accepted & (lane == row)) | (lane < row)
            return row + 1, self._first_without(accepted), num_drafted, numbers

        def wanted(carry):
            row, num_accepted, *_ = carry
            # As many accepted as rows were read: the next row is wanted, the bonus row at the latest.
            return num_accepted == row

        start = jnp.int32(0), jnp.int32(0), jnp.int32(0), self._no_numbers()
        _, num_accepted, num_drafted, numbers = lax.while_loop(wanted, body, start)
        self._emit(self._settle(numbers, num_accepted, num_drafted))

    def _read_draft(self, row, copy=0):
        self.share(self.num_chunks("draft"), lambda chunk: self.read("draft", row, chunk, self.known.draft, copy))

    def _is_usable(self, normalizer):
        """Whether a normalizer that was handed over is a number, and precise enough to be subtracted."""
        return jnp.abs(normalizer) <= self.largest_normalizer

    def _read_unusable(self):
        """The draft's rows whose normalizers cannot be used, which is rare."""
        lane = self._lane()
        normalizers = self.lanes(self.known.facts.normalizer, (self.sequence,))
        token = self.lanes(self.known.facts.token, (self.sequence,))
        bad = jnp.where(self._is_usable(normalizers), rows.NOWHERE, lane)
        any_bad = jnp.min(jnp.where((lane < self.num_draft) & (token >= 0), bad, rows.NOWHERE)) < rows.NOWHERE

        @pl.when(any_bad)
        def _():
            def one(row, carry):
                wanted = ~self._is_usable(self.inputs.normalizers[self.sequence, row])
                pl.when(wanted & (self.inputs.tokens[self.sequence, row] >= 0))(lambda: self._read_draft(row))
                return carry

            lax.fori_loop(0, self.num_draft, one, jnp.int32(0))
            self.meet()

    # Deciding: every block the same, from the same numbers. Vectors have an element a row.

    def _lane(self):
        return plgpu.broadcasted_iota(jnp.int32, (config.THREADS,), 0, layout=LAYOUT)

    def _full(self, value, dtype=jnp.float32):
        return plgpu.layout_cast(jnp.full((config.THREADS,), value, dtype), LAYOUT)

    def _first_without(self, holds):
        """The first row for which it does not hold."""
        return jnp.min(jnp.where(holds, rows.NOWHERE, self._lane()))

    def _slots(self, of, copy):
        """Where the numbers of each chunk are."""
        return [copy * self.num_chunks(of) + i for i in range(self.num_chunks(of))]

    def _together(self, of, copy):
        """Maximum and logarithm of the sum of each row, from its chunks."""
        known = getattr(self.known, of)
        count = self._slots(of, copy)
        tops = [self.lanes(known.top, (self.sequence, i)) for i in count]
        totals = [self.lanes(known.total, (self.sequence, i)) for i in count]
        scale, _ = self.filter(of, 0)
        rate = rows.LOG2_E if scale is None else scale * rows.LOG2_E
        top = functools.reduce(jnp.maximum, tops)
        parts = [s * jnp.exp2((m - top) * rate) for m, s in zip(tops, totals, strict=True)]
        return top, jnp.log(functools.reduce(jnp.add, parts))

    def _target(self, lane, copy):
        """Offset, log_sum and certain token of each row, whose sum is not finite where a row is degenerate."""
        top, log_sum = self._together("target", copy)
        if self.inputs.target_greedy is None:
            return top, log_sum, None
        # A comparison with a number that is the same for all rows.
        is_greedy = lane < jnp.where(self.inputs.target_greedy[self.sequence] > 0, config.THREADS, 0)
        first = self._full(rows.NOWHERE, jnp.int32)
        for i in self._slots("target", copy):
            here = self.lanes(self.known.target.top, (self.sequence, i)) == top
            at = self.lanes(self.known.target.first, (self.sequence, i))
            first = jnp.minimum(first, jnp.where(here, at, rows.NOWHERE))
        log_sum = jnp.where(is_greedy, 0.0, log_sum)
        return top, log_sum, jnp.where(is_greedy & (jnp.abs(top) < jnp.inf), first, -1)

    def _draft(self, copy):
        """Offset and log_sum of each of the draft's rows; read at most where no normalizers were handed over."""
        if self.inputs.normalizers is None:
            return self._together("draft", copy)
        normalizers = self.lanes(self.known.facts.normalizer, (self.sequence,))
        usable = self._is_usable(normalizers)
        top, log_sum = self._together("draft", copy)
        return jnp.where(usable, 0.0, top), jnp.where(usable, normalizers, log_sum)

    def _log_prob(self, of, logit, offset, log_sum):
        scale, _ = self.filter(of, 0)
        value = logit - offset
        value = (value if scale is None else value * scale) - log_sum
        value = jnp.where(jnp.abs(offset + log_sum) < jnp.inf, value, -jnp.inf)
        return jnp.minimum(value, 0.0)

    def _judge(self, copy=0):
        """The numbers of every row, whether its draft is accepted, and how many were drafted.

        Rows that were not read have numbers too, which mean nothing.
        """
        lane, facts = self._lane(), self.known.facts
        p_offset, p_log_sum, p_certain = self._target(lane, copy)
        numbers = Tables(p_offset, p_log_sum, p_certain, None, None, None, None, None)
        if self.num_draft == 0:
            return numbers, lane < 0, jnp.int32(0)
        token = self.lanes(facts.token, (self.sequence,))
        num_drafted = jnp.min(jnp.where((lane < self.num_draft) & (token < 0), lane, self.num_draft))
        log_p = self._log_prob("target", self.lanes(facts.target_logit, (self.sequence,)), p_offset, p_log_sum)
        if p_certain is not None:
            log_p = jnp.where(p_certain < 0, log_p, jnp.where(p_certain == token, 0.0, -jnp.inf))
        log_q = self._full(0.0)
        if self.inputs.draft is not None:
            q_offset, q_log_sum = self._draft(copy)
            log_q = self._log_prob("draft", self.lanes(facts.draft_logit, (self.sequence,)), q_offset, q_log_sum)
            numbers = numbers._replace(q_offset=q_offset, q_log_sum=q_log_sum)
            if self.inputs.draft_greedy is not None:
                # A greedy draft is certain of its token, unless its row makes no distribution.
                bound = jnp.where(self.inputs.draft_greedy[self.sequence] > 0, config.THREADS, 0)
                whole = jnp.abs(q_offset + q_log_sum) < jnp.inf
                log_q = jnp.where((lane < bound) & whole, 0.0, log_q)
        # A token that q cannot have given says nothing, like one from a degenerate row.
        trusted = (lane < num_drafted) & (log_q > -jnp.inf)
        usable = trusted & (log_p > -jnp.inf)
        log_ratio = jnp.where(usable, log_p - log_q, -jnp.inf)
        accepted = usable & (jnp.log(self.lanes(facts.accept, (self.sequence,))) < log_ratio)
        log_q = jnp.where(trusted, log_q, -jnp.inf)
        accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0))
        return numbers._replace(log_p=log_p, log_q=log_q, accept_prob=accept_prob), accepted, num_drafted

    def _no_numbers(self):
        """Zeros for what `_judge` returns."""
        zero = self._full(0.0)
        of_draft = zero if self.num_draft else None
        q = None if self.inputs.draft is None else of_draft
        certain = None if self.inputs.target_greedy is None else self._full(0, jnp.int32)
        return Tables(zero, zero, certain, q, q, of_draft, of_draft, of_draft)

    def _settle(self, numbers, row, num_drafted):
        """Writes the numbers of every row down, and returns what they say of the one that emits."""
        for ref, values in zip(self.tables, numbers, strict=True):
            if values is not None:
                # Registers -> L2: [THREADS].
                ref[self.sequence, self.block] = values
        fence()
        return self._at(row, num_drafted)

    def _get(self, ref, row):
        return ref[self.sequence, self.block, row]

    def _at(self, row, num_drafted):
        """What the tables say of one row."""
        table, none, nothing = self.tables, jnp.int32(-1), jnp.float32(0)
        offset, log_sum = self._get(table.p_offset, row), self._get(table.p_log_sum, row)
        certain = none if self.inputs.target_greedy is None else self._get(table.p_certain, row)
        rejecting = distrusted = jnp.bool_(False)
        q_offset, q_log_sum, q_certain = nothing, nothing, none
        if self.num_draft:
            at = self.draft_row(row)
            stopped, trusted = row < num_drafted, self._get(table.log_q, at) > -jnp.inf
            rejecting, distrusted = stopped & trusted, stopped & ~trusted
            drafted = self.inputs.tokens[self.sequence, at]
            if self.inputs.draft is None:
                q_certain = drafted
            else:
                q_offset, q_log_sum = self._get(table.q_offset, at), self._get(table.q_log_sum, at)
                if self.inputs.draft_greedy is not None:
                    q_certain = jnp.where(self.inputs.draft_greedy[self.sequence] > 0, drafted, -1)
        degenerate = ~(jnp.abs(offset + log_sum) < jnp.inf)
        if self.inputs.target_greedy is not None:
            # Of a greedy row, minus infinity everywhere is no number either.
            degenerate = degenerate | ((self.inputs.target_greedy[self.sequence] > 0) & (certain < 0))
        return _State(row, rejecting, distrusted, degenerate, offset, log_sum, certain, q_offset, q_log_sum, q_certain)

    # Emitting: the weights of one row.

    def weights(self, state, number, target_only=False):
        """[TILE] weights of the emitting row: max(p - q, 0) where a draft was rejected, else p."""
        row = state.num_accepted
        has_q = self.inputs.draft is not None and not target_only
        loaded, tile = self.load_tile(row, number, has_q)
        weights = rows.prob(loaded[0], rows.Row(state.p_offset, state.p_log_sum, *self.filter("target", row)))
        if has_q:
            of_draft = self.filter("draft", self.draft_row(row))
            q = rows.prob(loaded[1], rows.Row(state.q_offset, state.q_log_sum, *of_draft))
            # None, where no draft was rejected or q is certain of its token; NaN is none either.
            most = jnp.where(state.rejecting & (state.q_certain < 0), jnp.inf, -1.0)
            weights = jnp.maximum(weights - jnp.where(q <= most, q, 0.0), 0.0)
        inside = tile.inside
        if not target_only and (self.inputs.draft is None or self.inputs.draft_greedy is not None) and self.num_draft:
            # q is one at a certain token, and p no more than that.
            inside = inside & (tile.place != jnp.where(state.rejecting, state.q_certain, -1))
        return jnp.where(inside, weights, 0.0), tile

    def _emit(self, state):
        sampled = ~state.degenerate & (state.p_certain < 0)

        @pl.when(sampled)
        def _():
            self.sum_tiles(state)
            self.meet()

        self.write_drafts(state.num_accepted, lambda i: self._write_numbers(state, i))
        pl.when(sampled & (self.block == 0))(lambda: self._emit_sampled(state))
        pl.when(~sampled & (self.block == 0))(lambda: self._emit_certain(state))

    def _emit_sampled(self, state):
        empty = jnp.bool_(False)
        if self.num_draft:
            empty = state.rejecting & (jnp.sum(self.sums()) == 0)
            pl.when(empty)(lambda: self.sum_target_tiles(state))
        token = self.sample(state._replace(rejecting=state.rejecting & ~empty))
        x, _ = self.logit("target", state.num_accepted, token)
        self._write(state, token, self._log_prob("target", x, state.p_offset, state.p_log_sum), empty)

    def _emit_certain(self, state):
        row, degenerate = state.num_accepted, state.degenerate
        first = lax.cond(degenerate, lambda: self.first_number(row), lambda: jnp.int32(0))
        # All of the residual is where the draft left something of the one certain token.
        left = jnp.bool_(True)
        if self.num_draft:
            at = self.draft_row(row)
            log_q = jnp.where(state.q_certain == state.p_certain, 0.0, -jnp.inf)
            if self.inputs.draft is not None:
                x, outside = self.logit("draft", at, state.p_certain)
                soft = self._log_prob("draft", x, state.q_offset, state.q_log_sum)
                log_q = jnp.where(state.q_certain < 0, jnp.where(outside, -jnp.inf, soft), log_q)
            left = log_q < 0
        log_prob = jnp.where(degenerate, -jnp.inf, 0.0)
        token = jnp.where(degenerate, first, state.p_certain)
        self._write(state, token, log_prob, state.rejecting & ~degenerate & ~left)

    def _write(self, state, token, log_prob, empty):
        holds = state.degenerate, state.distrusted, empty
        self.write_last(state.num_accepted, token, self.flags, holds)
        self.results.log_probs[self.sequence, state.num_accepted] = log_prob

    def _write_numbers(self, state, i):
        """log-probabilities of accepted drafts, 0 behind the last token, and how probable acceptance was."""
        if self.num_draft == 0:
            return
        at = self.draft_row(i)
        log_p, accept_prob = self._get(self.tables.log_p, at), self._get(self.tables.accept_prob, at)

        @pl.when(i != state.num_accepted)
        def _():
            self.results.log_probs[self.sequence, i] = jnp.where(i < state.num_accepted, log_p, 0.0)

        @pl.when(i < self.num_draft)
        def _():
            self.results.accept_prob[self.sequence, i] = accept_prob
