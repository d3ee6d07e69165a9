"""The token rule, part one: which drafts of a sequence are accepted, of all rows at once or of one by itself."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._emission import Emission
from pallas_kernels._launch import Facts, Known, Tables

MAX_UNROLLED = 64
"""Chunks of a row whose numbers are joined without a loop: with hundreds the compiler gives up."""


class _Mass(NamedTuple):
    """What makes a distribution of rows: offset, logarithm of the sum, and the token that a greedy row is certain of.

    Numbers are not finite where a row is degenerate; `certain` is -1 where a row is certain of none.
    """

    offset: jax.Array
    log_sum: jax.Array
    certain: jax.Array | None = None


class Acceptance(Emission):
    """One sequence under the token rule; every block of it computes the same.

    What is said of rows is a vector with an element a row, or a number where one row is decided on by itself.

    Attributes:
      known: What is known of the rows.
    """

    def __init__(self, inputs, results, *place: Any, known: Known):
        super().__init__(inputs, results, *place)
        self.known = known

    def lane(self):
        lanes = config.row_lanes(self.num_draft + 1)
        return plgpu.broadcasted_iota(jnp.int32, (lanes,), 0, layout=rows.singles(lanes))

    def all_rows(self) -> tuple[Tables, jax.Array]:
        """The numbers of every row, and which drafts are accepted, a row a lane; of rows that were read apart."""
        facts = self.known.facts
        here = Facts(*(self.lanes(fact, (self.sequence,)) for fact in facts))
        here = here._replace(token=jnp.where(self.lane() < self.num_draft, here.token, -1))
        return self._judge(here, self._mass, self._same)

    def one_row(self, row: Any) -> tuple[Tables, jax.Array]:
        """The numbers of one row that was just read, and whether its draft is accepted."""
        at = self.draft_row(row)
        here = Facts(*(fact[self.sequence, at] for fact in self.known.facts))
        here = here._replace(token=jnp.where(row < self.num_draft, here.token, -1))
        return self._judge(here, functools.partial(self._mass_of_line, row), lambda flag: flag)

    def _same(self, flag):
        """One truth for all rows. A comparison with a number that is the same for all, for the compiler's sake."""
        return self.lane() < jnp.where(flag, config.THREADS, 0)

    def rate(self, of: str) -> Any:
        """What a difference of logits is multiplied by, for a power of two."""
        scale, _ = self.filter(of, 0)
        return rows.rate(scale)

    def _mass(self, of: str, is_greedy: Any) -> _Mass:
        """Of every row, from its chunks."""
        known, count, rate = getattr(self.known, of), self.num_chunks(of), self.rate(of)

        def each(room):
            def one(chunk):
                return self.lanes(room, (self.sequence, chunk))

            # All are asked for before the first is needed.
            return [one(i) for i in range(count)].__getitem__ if count <= MAX_UNROLLED else one

        tops, totals = each(known.top), each(known.total)
        top = _fold(count, jnp.maximum, tops)
        log_sum = jnp.log(_fold(count, jnp.add, lambda i: totals(i) * jnp.exp2((tops(i) - top) * rate)))
        if is_greedy is None:
            return _Mass(top, log_sum)
        firsts = each(known.first)
        first = _fold(count, jnp.minimum, lambda i: jnp.where(tops(i) == top, firsts(i), rows.NOWHERE))
        return _greedy_mass(top, log_sum, first, is_greedy)

    def _mass_of_line(self, row: Any, of: str, is_greedy: Any) -> _Mass:
        """Of one row, from its chunks."""
        known, count = getattr(self.known, of), self.num_chunks(of)
        place = self.sequence, row if of == "target" else self.draft_row(row)
        tops = self.first_lanes(known.top, place, count, -jnp.inf)
        totals = self.first_lanes(known.total, place, count, 0.0)
        top = jnp.max(tops)
        log_sum = jnp.log(jnp.sum(totals * jnp.exp2((tops - top) * self.rate(of))))
        if is_greedy is None:
            return _Mass(top, log_sum)
        places = jnp.where(tops == top, self.lanes(known.first, place), rows.NOWHERE)
        return _greedy_mass(top, log_sum, jnp.min(places), is_greedy)

    def log_prob(self, of, logit, offset, log_sum):
        scale, _ = self.filter(of, 0)
        value = logit - offset
        value = (value if scale is None else value * scale) - log_sum
        value = jnp.where(jnp.abs(offset + log_sum) < jnp.inf, value, -jnp.inf)
        return jnp.minimum(value, 0.0)

    def _judge(self, here: Facts, mass: Any, same: Any) -> tuple[Tables, jax.Array]:
        """Numbers and decisions from what is known of drafted tokens and rows.

        Rows that were not read have numbers too, which mean nothing.
        """

        def greedy(flags):
            return same(flags[self.sequence] > 0)

        p = mass("target", None if self.inputs.target_greedy is None else greedy(self.inputs.target_greedy))
        numbers = Tables(here.token, p.offset, p.log_sum, p.certain, None, None, None, None, None)
        if self.num_draft == 0:
            return numbers, here.token >= 0
        log_p = self.log_prob("target", here.target_logit, p.offset, p.log_sum)
        if p.certain is not None:
            log_p = jnp.where(p.certain < 0, log_p, jnp.where(p.certain == here.token, 0.0, -jnp.inf))
        log_q = jnp.zeros_like(log_p)
        if self.inputs.draft is not None:
            handed_over = self.inputs.normalizers is not None
            q = _Mass(here.q_offset, here.q_log_sum) if handed_over else mass("draft", None)
            log_q = self.log_prob("draft", here.draft_logit, q.offset, q.log_sum)
            numbers = numbers._replace(q_offset=q.offset, q_log_sum=q.log_sum)
            if self.inputs.draft_greedy is not None:
                # A greedy draft is certain of its token, unless its row makes no distribution.
                whole = jnp.abs(q.offset + q.log_sum) < jnp.inf
                log_q = jnp.where(greedy(self.inputs.draft_greedy) & whole, 0.0, log_q)
        # A token that q cannot have given says nothing, like one from a degenerate row.
        trusted = (here.token >= 0) & (log_q > -jnp.inf)
        usable = trusted & (log_p > -jnp.inf)
        log_ratio = jnp.where(usable, log_p - log_q, -jnp.inf)
        accepted = usable & (jnp.log(here.accept) < log_ratio)
        log_q = jnp.where(trusted, log_q, -jnp.inf)
        accept_prob = jnp.exp(jnp.minimum(log_ratio, 0.0))
        return numbers._replace(log_p=log_p, log_q=log_q, accept_prob=accept_prob), accepted


def _fold(count: int, fn: Any, of: Any) -> jax.Array:
    """`fn` of all of `of(0)`, `of(1)`, ..."""
    if count <= MAX_UNROLLED:
        return functools.reduce(fn, map(of, range(count)))
    return lax.fori_loop(1, count, lambda i, joined: fn(joined, of(i)), of(0))


def _greedy_mass(top, log_sum, first, is_greedy) -> _Mass:
    """All of the mass of a greedy row is at its first largest logit, if that is a number."""
    certain = jnp.where(is_greedy & (jnp.abs(top) < jnp.inf), first, -1)
    return _Mass(top, jnp.where(is_greedy, 0.0, log_sum), certain)
