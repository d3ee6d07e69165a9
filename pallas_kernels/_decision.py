"""The token rule, part two: reading as far as is needed, and the token of the row where a sequence stops."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _rows as rows
from pallas_kernels._acceptance import Acceptance
from pallas_kernels._launch import Flags, Known, Tables, fence


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


class Decision(Acceptance):
    """One sequence under the token rule.

    Attributes:
      tables: Where a block writes one number a row, to read it by the row's number.
    """

    def __init__(
        self, inputs, results, *place: Any, known: Known, tables: Tables, largest_normalizer: float, flags: Flags
    ):
        super().__init__(inputs, results, *place, known=known, largest_normalizer=largest_normalizer)
        self.tables, self.flags = tables, Flags(*flags)

    def emit(self):
        """Decides, after all target rows were read, and those of a draft without normalizers."""
        if self.inputs.normalizers is not None:
            self._read_unusable()
        numbers, accepted, num_drafted = self.judge()
        self._emit(self._settle(numbers, self.first_without(accepted), num_drafted))

    def read_and_emit(self):
        """Reads row after row, and decides on each, up to the first rejection.

        What is known of chunks has two copies, and a row takes the one that the row before it did not: a block that
        is ahead writes in neither line that another may still be reading.
        """
        if self.num_draft:
            self.share(self.num_draft, lambda row: self.look_up(row, self.known.facts))
        lane = self.lane()

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
                    wanted = wanted & ~self.is_usable(self.inputs.normalizers[self.sequence, at])
                pl.when(wanted)(lambda: self._read_draft(at, copy))
            self.meet()
            new, accepted, num_drafted = self.judge(copy)
            numbers = jax.tree.map(lambda ours, before: jnp.where(lane == row, ours, before), new, numbers)
            # The rows before were accepted, or this one were not read.
            accepted = (accepted & (lane == row)) | (lane < row)
            return row + 1, self.first_without(accepted), num_drafted, numbers

        def wanted(carry):
            row, num_accepted, *_ = carry
            # As many accepted as rows were read: the next row is wanted, the bonus row at the latest.
            return num_accepted == row

        start = jnp.int32(0), jnp.int32(0), jnp.int32(0), self.no_numbers()
        _, num_accepted, num_drafted, numbers = lax.while_loop(wanted, body, start)
        self._emit(self._settle(numbers, num_accepted, num_drafted))

    def _read_draft(self, row, copy=0):
        self.share(self.num_chunks("draft"), lambda chunk: self.read("draft", row, chunk, self.known.draft, copy))

    def _read_unusable(self):
        """The draft's rows whose normalizers cannot be used, which is rare."""
        lane = self.lane()
        normalizers = self.lanes(self.known.facts.normalizer, (self.sequence,))
        token = self.lanes(self.known.facts.token, (self.sequence,))
        bad = jnp.where(self.is_usable(normalizers), rows.NOWHERE, lane)
        any_bad = jnp.min(jnp.where((lane < self.num_draft) & (token >= 0), bad, rows.NOWHERE)) < rows.NOWHERE

        @pl.when(any_bad)
        def _():
            def one(row, carry):
                wanted = ~self.is_usable(self.inputs.normalizers[self.sequence, row])
                pl.when(wanted & (self.inputs.tokens[self.sequence, row] >= 0))(lambda: self._read_draft(row))
                return carry

            lax.fori_loop(0, self.num_draft, one, jnp.int32(0))
            self.meet()

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
        self._write(state, token, self.log_prob("target", x, state.p_offset, state.p_log_sum), empty)

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
                soft = self.log_prob("draft", x, state.q_offset, state.q_log_sum)
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
