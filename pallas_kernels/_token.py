"""The token rule in one launch: a cluster of blocks a sequence."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import _rows as rows
from pallas_kernels._launch import Filter, fence, launch, make_operands


class TokenResult(NamedTuple):
    """What the token rule decides for B sequences.

    Attributes:
      num_accepted: How many drafts were accepted.
      token: The residual or bonus token.
      log_prob: Its log-probability, -inf from a degenerate row.
      draft_log_probs: log p of each drafted token, -inf where nothing was drafted.
      log_ratios: log p - log q of each drafted token, -inf where the draft cannot be accepted whatever u.
      degenerate_target: Whether a target row in use holds NaN or +inf, or keeps nothing.
      degenerate_draft: The same of a draft row.
      empty_residual: Whether a draft was rejected where max(p - q, 0) is zero to the last bit.
    """

    num_accepted: Int[Array, "B"]
    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    draft_log_probs: Float[Array, "B K"]
    log_ratios: Float[Array, "B K"]
    degenerate_target: Bool[Array, "B"]
    degenerate_draft: Bool[Array, "B"]
    empty_residual: Bool[Array, "B"]


class _Normalized(NamedTuple):
    """A row after its shares are put together. `certain` is -1, or the token that has all probability."""

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


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    log_normalizers: Float[Array, "B K"] | None,
    tokens: Int[Array, "B K"],
    num_drafted: Int[Array, "B"],
    log_uniforms: Float[Array, "B K"],
    uniforms: Float[Array, "B 2"],
    *,
    largest_normalizer: float,
) -> TokenResult:
    """The token rule on a GPU, Hopper or newer.

    Accepts drafts while `log u < log p - log q`, then emits one token from max(p - q, 0), or from p after all
    `num_drafted` acceptances, by two-level inversion: `uniforms` pick a tile of `TILE` tokens, then a token.
    Rows at and past `num_drafted` are not read, but for the target's row `num_drafted` itself. Normalizers
    that were handed over take the place of reading the draft's rows; those larger than `largest_normalizer`,
    or NaN, do not.

    Logits are bfloat16, float16 or float32, of any V from `TILE` on; arithmetic is float32, exponentials are
    the hardware's (about 2 units in the last place).
    """
    operands = make_operands(
        target_logits,
        target_filter,
        draft_logits,
        draft_filter,
        log_normalizers,
        tokens,
        num_drafted,
        log_uniforms,
        uniforms,
    )
    out = launch(functools.partial(Sequence, largest_normalizer=largest_normalizer), operands, target_logits.shape)
    num_draft = tokens.shape[1]
    ints = out.ints
    return TokenResult(
        num_accepted=ints[:, 0],
        token=ints[:, 1],
        log_prob=out.log_prob,
        draft_log_probs=out.draft_log_probs[:, :num_draft],
        log_ratios=out.log_ratios[:, :num_draft],
        degenerate_target=ints[:, 2] > 0,
        degenerate_draft=ints[:, 3] > 0,
        empty_residual=ints[:, 4] > 0,
    )


class Sequence:
    """The body of the kernel, as one block of the cluster of one sequence runs it."""

    def __init__(self, inputs, results, barrier, vocab_size, chosen, *, largest_normalizer):
        self.inputs, self.results, self.barrier = inputs, results, barrier
        self.vocab_size, self.chosen, self.largest_normalizer = vocab_size, chosen, largest_normalizer
        self.num_draft = 0 if inputs.tokens is None else inputs.tokens.shape[1]
        self.sequence, self.block = lax.axis_index("sequence"), lax.axis_index("block")
        self.num_drafted = inputs.num_drafted[self.sequence] if self.num_draft else 0

    def run(self):
        if self.chosen.early_exit and self.num_draft:
            state = self._row_after_row()
        else:
            lax.fori_loop(0, self.num_drafted + 1, self._read_row, jnp.int32(0))
            self._meet()
            state = lax.fori_loop(0, self.num_drafted + 1, self._decide, self._start())
        certain = state.p.certain >= 0
        sampled = ~state.p.degenerate & ~certain
        pl.when(sampled)(lambda: self._write_sums(state))
        pl.when(state.p.degenerate)(lambda: self._find_first(state))
        self._meet()
        pl.when(self.block == 0)(lambda: self._emit(state, sampled))

    def _row_after_row(self):
        """Reads up to the first rejection. Rows after it keep a ratio of zero."""

        @pl.when(self.block == 0)
        def _():
            for row in range(self.num_draft):
                self.results.draft_log_probs[self.sequence, row] = jnp.float32(-jnp.inf)
                self.results.log_ratios[self.sequence, row] = jnp.float32(-jnp.inf)

        def body(carry):
            row, state = carry
            self._read_row(row, jnp.int32(0))
            self._meet()
            return row + 1, self._decide(row, state)

        def wanted(carry):
            row, state = carry
            return state.going & (row <= self.num_drafted)

        return lax.while_loop(wanted, body, (jnp.int32(0), self._start()))[1]

    # Reading: each block its share of each row.

    def _filter(self, of, row):
        scale, cutoff = (getattr(self.inputs, f"{of}_{name}") for name in ("scale", "cutoff"))
        return (
            None if scale is None else scale[self.sequence],
            None if cutoff is None else cutoff[self.sequence, row],
        )

    def _row(self, of, row):
        """A row's number in the flat array."""
        return self.sequence * (self.num_draft + (of == "target")) + row

    def _read_row(self, row, carry):
        self._read_share("target", row, row)
        if self.inputs.draft is not None:
            wanted = row < self.num_drafted
            if self.inputs.normalizers is not None:
                at = jnp.minimum(row, self.num_draft - 1)
                wanted = wanted & ~self._is_usable(self.inputs.normalizers[self.sequence, at])
            pl.when(wanted)(lambda: self._read_share("draft", row, self.num_draft + 1 + row))
        return carry

    def _is_usable(self, normalizer):
        """Whether a normalizer that was handed over is a number, and precise enough to be subtracted."""
        return jnp.abs(normalizer) <= self.largest_normalizer

    def _read_share(self, of, row, slot):
        """The share's maximum and sum, to where the other blocks of the cluster find them."""
        ref, out = getattr(self.inputs, of), self.results
        place = self.sequence, slot, self.block

        def soft():
            out.largest[place], out.total[place] = rows.log_sum_share(
                ref, self.vocab_size, self._row(of, row), *self._filter(of, row), self.block, self.chosen.cluster
            )

        def greedy():
            out.largest[place], out.first[place], out.total[place] = rows.first_largest_share(
                ref, self.vocab_size, self._row(of, row), self.block, self.chosen.cluster
            )

        is_greedy = self.inputs.target_greedy if of == "target" else None
        if is_greedy is None:
            soft()
        else:
            pl.when(is_greedy[self.sequence] > 0)(greedy)
            pl.when(is_greedy[self.sequence] == 0)(soft)

    def _meet(self):
        """Waits for all blocks of the cluster, and sees what they wrote."""
        if self.chosen.cluster == 1:
            return
        fence()
        plgpu.barrier_arrive(self.barrier)
        plgpu.barrier_wait(self.barrier)
        fence()

    # Deciding: every block the same, from the same numbers.

    def _together(self, slot, scale):
        """Maximum and logarithm of the sum of a whole row from its shares."""
        count = range(self.chosen.cluster)
        largest = [self.results.largest[self.sequence, slot, i] for i in count]
        total = [self.results.total[self.sequence, slot, i] for i in count]
        top = functools.reduce(jnp.maximum, largest)
        rate = rows.LOG2_E if scale is None else scale * rows.LOG2_E
        whole = functools.reduce(jnp.add, [s * jnp.exp2((m - top) * rate) for m, s in zip(largest, total, strict=True)])
        return top, whole

    def _target(self, row):
        scale, _ = self._filter("target", row)
        top, whole = self._together(row, scale)
        log_sum, certain = jnp.log(whole), jnp.int32(-1)
        if self.inputs.target_greedy is not None:
            greedy = self.inputs.target_greedy[self.sequence] > 0
            first = jnp.int32(rows.NOWHERE)
            poison = jnp.float32(0)
            for i in range(self.chosen.cluster):
                place = self.sequence, row, i
                here = self.results.largest[place] == top
                first = jnp.minimum(first, jnp.where(here, self.results.first[place], rows.NOWHERE))
                poison = poison + self.results.total[place]
            certain = jnp.where(greedy, first, -1)
            log_sum = jnp.where(greedy, jnp.where(first < rows.NOWHERE, poison - poison, -jnp.inf), log_sum)
        degenerate = ~(jnp.abs(top + log_sum) < jnp.inf)
        return _Normalized(top, log_sum, jnp.where(degenerate, -1, certain), degenerate)

    def _draft(self, row):
        """The draft's row; read at most where the drafter did not hand over its normalizers."""
        inputs = self.inputs
        token = inputs.tokens[self.sequence, row]
        if inputs.draft is None:
            return _Normalized(jnp.float32(0), jnp.float32(0), token, jnp.bool_(False))

        def read():
            top, whole = self._together(self.num_draft + 1 + row, self._filter("draft", row)[0])
            return top, jnp.log(whole)

        if inputs.normalizers is None:
            top, log_sum = read()
        else:
            normalizer = inputs.normalizers[self.sequence, row]
            top, log_sum = lax.cond(self._is_usable(normalizer), lambda: (jnp.float32(0), normalizer), read)
        degenerate = ~(jnp.abs(top + log_sum) < jnp.inf)
        certain = jnp.int32(-1)
        if inputs.draft_greedy is not None:
            certain = jnp.where(inputs.draft_greedy[self.sequence] > 0, token, -1)
        return _Normalized(top, log_sum, certain, degenerate)

    def _log_prob(self, of, row, token, normalized):
        """log-probability of one token; -inf where it has none."""
        ref = getattr(self.inputs, of)
        outside = (token < 0) | (token >= self.vocab_size)
        certain = jnp.where(normalized.certain == token, 0.0, -jnp.inf)
        if ref is None:
            value = certain
        else:
            scale, cutoff = self._filter(of, row)
            x = ref[self._row(of, row) * self.vocab_size + jnp.where(outside, 0, token)].astype(jnp.float32)
            value = x - normalized.offset
            value = value if scale is None else value * scale
            value = value - normalized.log_sum
            if cutoff is not None:
                outside = outside | (x < cutoff)
            value = jnp.where(outside, -jnp.inf, value)
            value = jnp.where(normalized.certain < 0, value, certain)
        return jnp.where(normalized.degenerate, -jnp.inf, jnp.minimum(value, 0.0))

    def _start(self):
        nothing = _Normalized(jnp.float32(0), jnp.float32(0), jnp.int32(-1), jnp.bool_(False))
        no = jnp.bool_(False)
        return _State(jnp.bool_(True), jnp.int32(0), nothing, nothing, no, no, no)

    def _decide(self, row, state):
        """One more row: its draft accepted or not, while `going`; its probabilities in any case."""
        p = self._target(row)
        going = state.going
        if self.num_draft == 0:
            return state._replace(p=p, degenerate_target=p.degenerate)
        drafted = row < self.num_drafted
        at = jnp.minimum(row, self.num_draft - 1)
        q = self._draft(at)
        token = self.inputs.tokens[self.sequence, at]
        log_p, log_q = self._log_prob("target", row, token, p), self._log_prob("draft", at, token, q)
        # A token that q cannot have given says nothing, like one from a degenerate row.
        trusted = drafted & (log_q > -jnp.inf)
        usable = trusted & (log_p > -jnp.inf)
        log_ratio = jnp.where(usable, log_p - log_q, -jnp.inf)

        @pl.when(drafted & (self.block == 0))
        def _():
            self.results.draft_log_probs[self.sequence, row] = log_p
            self.results.log_ratios[self.sequence, row] = log_ratio

        accepted = going & usable & (self.inputs.log_uniforms[self.sequence, at] < log_ratio)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(going, a, b), new, old)

        return _State(
            going=accepted,
            num_accepted=state.num_accepted + accepted.astype(jnp.int32),
            p=keep(p, state.p),
            q=keep(q, state.q),
            rejecting=jnp.where(going, trusted, state.rejecting),
            degenerate_target=state.degenerate_target | (going & p.degenerate),
            degenerate_draft=state.degenerate_draft | (going & drafted & ~trusted),
        )

    # Emitting: the weights of one row, tile by tile.

    def _weights(self, state, tile_number, target_only=False):
        """[TILE] weights of the emitting row: max(p - q, 0) where a draft was rejected, else p."""
        row, vocab_size, inputs = state.num_accepted, self.vocab_size, self.inputs
        at = jnp.minimum(row, max(self.num_draft - 1, 0))
        has_q = inputs.draft is not None and not target_only
        p_row, q_row = self._row("target", row), self._row("draft", at)
        places = [(inputs.target, p_row), (inputs.draft, q_row)]
        tile = rows.tile_at(tile_number, vocab_size, places[: 1 + has_q])
        x = rows.load_tile(inputs.target, vocab_size, p_row, tile)
        weights = rows.prob(x, rows.Row(state.p.offset, state.p.log_sum, *self._filter("target", row)))
        if has_q:
            x = rows.load_tile(inputs.draft, vocab_size, q_row, tile)
            q = rows.prob(x, rows.Row(state.q.offset, state.q.log_sum, *self._filter("draft", at)))
            # Of no element, where no draft was rejected or q is certain of its token.
            until = jnp.where(state.rejecting & (state.q.certain < 0), vocab_size, 0)
            weights = jnp.maximum(weights - jnp.where(tile.place < until, q, 0.0), 0.0)
        if not target_only:
            # q is one at a certain token, and p no more than that.
            without = jnp.where(state.rejecting, state.q.certain, -1)
            weights = jnp.where(tile.place == without, 0.0, weights)
        return jnp.where(tile.inside, weights, 0.0), tile

    def _write_sums(self, state):
        """This block's share of the tile sums, to where block 0 finds them."""
        sums, cluster = self.results.sums, self.chosen.cluster
        num_sums = sums.shape[1]

        def one(i, carry):
            tile = self.block + i * cluster
            weights, _ = self._weights(state, tile)
            sums[self.sequence, tile] = jnp.sum(weights)
            return carry

        lax.fori_loop(0, (num_sums - self.block + cluster - 1) // cluster, one, jnp.int32(0))

    def _find_first(self, state):
        """The first largest number of a row that makes no distribution."""
        place = self.sequence, self._spare(), self.block
        self.results.largest[place], self.results.first[place], _ = rows.first_largest_share(
            self.inputs.target,
            self.vocab_size,
            self._row("target", state.num_accepted),
            self.block,
            self.chosen.cluster,
        )

    def _load_sums(self):
        sums = self.results.sums
        # L2 -> registers: [tiles].
        layout = plgpu.Layout.WG_STRIDED(sums.shape[1:], vec_size=1)
        return plgpu.load(sums.at[self.sequence], layout=layout)

    def _sample(self, state, distrusted):
        """A token by the weights, by the target's alone where those are all zero, or where q is distrusted."""
        sums, sequence = self.results.sums, self.sequence

        empty = jnp.sum(self._load_sums()) == 0
        alone = empty | distrusted

        @pl.when(alone)
        def _():
            def one(tile, carry):
                sums[sequence, tile] = jnp.sum(self._weights(state, tile, target_only=True)[0])
                return carry

            lax.fori_loop(0, sums.shape[1], one, jnp.int32(0))

        number = rows.search(self._load_sums(), self.inputs.uniforms[sequence, 0])
        weights, tile = self._weights(state._replace(rejecting=state.rejecting & ~alone), number)
        return tile.first * tile.vec + rows.search(weights, self.inputs.uniforms[sequence, 1]), empty

    def _spare(self):
        """The slot of shares that no row uses: the others may still be read when this one is written."""
        return 2 * self.num_draft + 1

    def _emit(self, state, sampled):
        out, sequence = self.results, self.sequence
        row = state.num_accepted
        out.ints[sequence, 0] = state.num_accepted
        out.ints[sequence, 2] = state.degenerate_target.astype(jnp.int32)
        out.ints[sequence, 3] = state.degenerate_draft.astype(jnp.int32)

        @pl.when(sampled)
        def _():
            token, empty = self._sample(state, jnp.bool_(False))
            out.ints[sequence, 1] = token
            out.ints[sequence, 4] = (empty & state.rejecting).astype(jnp.int32)
            out.log_prob[sequence] = self._log_prob("target", row, token, state.p)

        @pl.when(~sampled)
        def _():
            top = functools.reduce(
                jnp.maximum, [out.largest[sequence, self._spare(), i] for i in range(self.chosen.cluster)]
            )
            first = jnp.int32(rows.NOWHERE)
            for i in range(self.chosen.cluster):
                place = sequence, self._spare(), i
                first = jnp.minimum(first, jnp.where(out.largest[place] == top, out.first[place], rows.NOWHERE))
            first = jnp.where(first < self.vocab_size, first, 0)
            degenerate = state.p.degenerate
            out.ints[sequence, 1] = jnp.where(degenerate, first, state.p.certain)
            # All of the residual is where the draft left something of the one certain token.
            at = jnp.minimum(row, max(self.num_draft - 1, 0))
            left = jnp.bool_(True)
            if self.num_draft:
                left = self._log_prob("draft", at, state.p.certain, state.q) < 0
            out.ints[sequence, 4] = (state.rejecting & ~degenerate & ~left).astype(jnp.int32)
            out.log_prob[sequence] = jnp.where(degenerate, -jnp.inf, 0.0)
