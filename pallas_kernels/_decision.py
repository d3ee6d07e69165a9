"""The token rule, part two: reading as far as is needed, and the token of the row where a sequence stops."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels import _sums as summing
from pallas_kernels import _waits as waits
from pallas_kernels._acceptance import Acceptance
from pallas_kernels._launch import Known, Tables


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
      early_exit: Whether rows are read here, up to the first rejection.
    """

    def __init__(self, inputs, results, *place: Any, known: Known, tables: Tables, early_exit: bool):
        super().__init__(inputs, results, *place, known=known)
        self.tables, self.early_exit = tables, early_exit

    def run(self):
        """Decides, after all rows were read, or reading them; and emits."""
        summing.clear_before(self.room)
        if self.early_exit:
            row = self._read_up_to_rejection()
        else:
            waits.wait_for_last()
            row = self._decide()
        self._emit(self._at(row))

    def _decide(self):
        """Writes the numbers of every row down, and returns the first row whose draft is not accepted."""
        numbers, accepted = self.all_rows()
        self._write_down(slice(None), numbers)
        return jnp.min(jnp.where(accepted, rows.NOWHERE, self.lane()))

    def _read_up_to_rejection(self):
        """Reads row after row, and decides on each, up to the first rejection."""
        if self.num_draft:
            self.share(self.num_draft, lambda row: self.look_up(row, self.known.facts))

        def body(carry):
            row, _ = carry
            self.share(self.num_chunks("target"), lambda chunk: self.read("target", row, chunk, self.known.target))
            if self.known.draft is not None:
                at = self.draft_row(row)
                wanted = (row < self.num_draft) & (self.inputs.tokens[self.sequence, at] >= 0)
                pl.when(wanted)(lambda: self._read_draft(at))
            self.meet()
            numbers, accepted = self.one_row(row)
            self._write_down(row, numbers)
            return row + 1, accepted

        # After an accepted draft the next row is wanted, the bonus row at the latest.
        row, _ = lax.while_loop(lambda carry: carry[1], body, (jnp.int32(0), jnp.bool_(True)))
        return row - 1

    def _read_draft(self, row):
        self.share(self.num_chunks("draft"), lambda chunk: self.read("draft", row, chunk, self.known.draft))

    def _write_down(self, at, numbers: Tables):
        for ref, values in zip(self.tables, numbers, strict=True):
            if values is not None:
                # Registers -> shared memory: [lanes], or one.
                ref[at] = values

    def _at(self, row):
        """What the tables say of one row."""
        table, none, nothing = self.tables, jnp.int32(-1), jnp.float32(0)
        offset, log_sum = table.p_offset[row], table.p_log_sum[row]
        certain = none if self.inputs.target_greedy is None else table.p_certain[row]
        rejecting = distrusted = jnp.bool_(False)
        q_offset, q_log_sum, q_certain = nothing, nothing, none
        if self.num_draft:
            drafted, trusted = table.token[row], table.log_q[row] > -jnp.inf
            stopped = drafted >= 0
            rejecting, distrusted = stopped & trusted, stopped & ~trusted
            if self.inputs.draft is None:
                q_certain = drafted
            else:
                q_offset, q_log_sum = table.q_offset[row], table.q_log_sum[row]
                if self.inputs.draft_greedy is not None:
                    q_certain = jnp.where(self.inputs.draft_greedy[self.sequence] > 0, drafted, -1)
        degenerate = ~(jnp.abs(offset + log_sum) < jnp.inf)
        if self.inputs.target_greedy is not None:
            # Of a greedy row, minus infinity everywhere is no number either.
            degenerate = degenerate | ((self.inputs.target_greedy[self.sequence] > 0) & (certain < 0))
        return _State(row, rejecting, distrusted, degenerate, offset, log_sum, certain, q_offset, q_log_sum, q_certain)

    # Emitting: the weights of one row.

    def weights(self, state, loaded, tile, rejecting):
        """[TILE] weights of the emitting row: max(p - q, 0) where a draft was rejected, else p."""
        row = state.num_accepted
        weights = rows.prob(loaded[0], rows.Row(state.p_offset, state.p_log_sum, *self.filter("target", row)))
        if self.num_draft == 0 or rejecting is False:
            return weights
        may_be_certain = self.inputs.draft is None or self.inputs.draft_greedy is not None
        if self.inputs.draft is not None:
            of_draft = self.filter("draft", self.draft_row(row))
            q = rows.prob(loaded[1], rows.Row(state.q_offset, state.q_log_sum, *of_draft))
            if rejecting is None or may_be_certain:
                # None, where no draft was rejected or q is certain of its token; NaN is none either.
                most = jnp.where(state.rejecting & (state.q_certain < 0), jnp.inf, -1.0)
                q = jnp.where(q <= most, q, 0.0)
            weights = jnp.maximum(weights - q, 0.0)
        if may_be_certain:
            # q is one at a certain token, and p no more than that.
            weights = jnp.where(tile.place() != jnp.where(state.rejecting, state.q_certain, -1), weights, 0.0)
        return weights

    def _emit(self, state):
        sampled = ~state.degenerate & (state.p_certain < 0)
        # Chunks' sums of the target are known; what was left of p by a rejected draft, and odd chunks, are not.
        unknown = sampled if self._tiles is None else sampled & state.rejecting

        def add_up():
            self.sum_tiles(state) if self._tiles is None else self.sum_groups(state, True)
            return self.meet()

        emits = lax.cond(unknown, add_up, lambda: self.is_last)
        self.write_drafts(
            state.num_accepted, lambda i: self.tables.token[i], lambda i: self._write_numbers(state.num_accepted, i)
        )
        pl.when(sampled & emits)(lambda: self._emit_sampled(state, unknown))
        pl.when(~sampled & emits)(lambda: self._emit_certain(state))

    def _emit_sampled(self, state, unknown):
        number, total = lax.cond(unknown, self.choose_tile, lambda: (jnp.int32(0), jnp.float32(0)))
        # Either nothing was added up, or a draft was rejected where nothing is left of p.
        of_target = total == 0
        number = lax.cond(of_target, lambda: self._choose_target_tile(state), lambda: number)
        empty = state.rejecting & of_target
        token = self.choose_token(state._replace(rejecting=state.rejecting & ~of_target), number)
        x, _ = self.logit("target", state.num_accepted, token)
        self._write(state, token, self.log_prob("target", x, state.p_offset, state.p_log_sum), empty)

    @property
    def _tiles(self) -> int | None:
        """Tiles of a chunk of the target, where chunks are whole tiles."""
        return config.chunks(self.inputs.target.dtype, self.vocab_size).tiles

    def _choose_target_tile(self, state):
        """A tile of the target alone by the first uniform: a chunk, then one of its tiles."""
        if self._tiles is None:
            self.sum_target_tiles(state)
            return self.choose_tile()[0]
        lines = self.known.target if self.known.lines is None else self.known.lines
        place, count = (self.sequence, state.num_accepted), self.num_chunks("target")
        tops = self.first_lanes(lines.top, place, count, -jnp.inf)
        totals = self.first_lanes(lines.total, place, count, 0.0)
        weights = totals * jnp.exp2((tops - state.p_offset) * self.rate("target"))
        # Less than any uniform but 0 can reach: the chunk's probabilities may be zeros.
        found = summing.running_sums(self.room, jnp.where(weights > 2.0**-80, weights, 0.0))
        wanted = self.emit[0] * found.total
        chunk = summing.first_beyond(found, wanted)
        # Relative to all of p, as the weights of tiles are.
        rest = (wanted - self.room[summing.BEFORE + chunk - 1]) * jnp.exp2(state.p_log_sum * -rows.LOG2_E)
        first = chunk * self._tiles
        read = [self.load_tile(self.pair(place[1], False), first + i) for i in range(self._tiles)]
        tiles = [rows.only_inside(self.weights(state, loaded, tile, False), tile) for tile, loaded in read]
        vec = read[0][0].vec
        sums = summing.numbers_of(summing.sum_each(tiles, vec), vec)
        return first + summing.first_of_few_beyond(sums, rest).number

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
        self.write_last(state.num_accepted, token, holds)
        self.results.log_probs[self.sequence, state.num_accepted] = log_prob

    def _write_numbers(self, count, i):
        """log-probabilities of accepted drafts, 0 behind the last token, and how probable acceptance was."""
        if self.num_draft == 0:
            return
        at = self.draft_row(i)
        log_p, accept_prob = self.tables.log_p[at], self.tables.accept_prob[at]

        @pl.when(i != count)
        def _():
            self.results.log_probs[self.sequence, i] = jnp.where(i < count, log_p, 0.0)

        @pl.when(i < self.num_draft)
        def _():
            # Behind the first rejection nothing was read.
            is_known = (i <= count) if self.early_exit else True
            self.results.accept_prob[self.sequence, i] = jnp.where(is_known, accept_prob, 0.0)
