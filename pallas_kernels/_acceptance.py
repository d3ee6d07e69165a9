"""The token rule, part one: which drafts of a sequence are accepted, all rows at once, a row a thread."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._emission import Emission
from pallas_kernels._launch import Known, Tables

LAYOUT = plgpu.Layout.WG_STRIDED((config.THREADS,), vec_size=1)


class Acceptance(Emission):
    """One sequence under the token rule. Vectors have an element a row; every block computes the same.

    Attributes:
      known: What is known of the rows.
    """

    def __init__(self, inputs, results, *place: Any, known: Known, largest_normalizer: float):
        super().__init__(inputs, results, *place)
        self.known, self.largest_normalizer = known, largest_normalizer

    def is_usable(self, normalizer):
        """Whether a normalizer that was handed over is a number, and precise enough to be subtracted."""
        return jnp.abs(normalizer) <= self.largest_normalizer

    def lane(self):
        return plgpu.broadcasted_iota(jnp.int32, (config.THREADS,), 0, layout=LAYOUT)

    def _full(self, value, dtype=jnp.float32):
        return plgpu.layout_cast(jnp.full((config.THREADS,), value, dtype), LAYOUT)

    def first_without(self, holds):
        """The first row for which it does not hold."""
        return jnp.min(jnp.where(holds, rows.NOWHERE, self.lane()))

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
        usable = self.is_usable(normalizers)
        top, log_sum = self._together("draft", copy)
        return jnp.where(usable, 0.0, top), jnp.where(usable, normalizers, log_sum)

    def log_prob(self, of, logit, offset, log_sum):
        scale, _ = self.filter(of, 0)
        value = logit - offset
        value = (value if scale is None else value * scale) - log_sum
        value = jnp.where(jnp.abs(offset + log_sum) < jnp.inf, value, -jnp.inf)
        return jnp.minimum(value, 0.0)

    def judge(self, copy=0):
        """The numbers of every row, whether its draft is accepted, and how many were drafted.

        Rows that were not read have numbers too, which mean nothing.
        """
        lane, facts = self.lane(), self.known.facts
        p_offset, p_log_sum, p_certain = self._target(lane, copy)
        numbers = Tables(p_offset, p_log_sum, p_certain, None, None, None, None, None)
        if self.num_draft == 0:
            return numbers, lane < 0, jnp.int32(0)
        token = self.lanes(facts.token, (self.sequence,))
        num_drafted = jnp.min(jnp.where((lane < self.num_draft) & (token < 0), lane, self.num_draft))
        log_p = self.log_prob("target", self.lanes(facts.target_logit, (self.sequence,)), p_offset, p_log_sum)
        if p_certain is not None:
            log_p = jnp.where(p_certain < 0, log_p, jnp.where(p_certain == token, 0.0, -jnp.inf))
        log_q = self._full(0.0)
        if self.inputs.draft is not None:
            q_offset, q_log_sum = self._draft(copy)
            log_q = self.log_prob("draft", self.lanes(facts.draft_logit, (self.sequence,)), q_offset, q_log_sum)
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

    def no_numbers(self):
        """Zeros for what `_judge` returns."""
        zero = self._full(0.0)
        of_draft = zero if self.num_draft else None
        q = None if self.inputs.draft is None else of_draft
        certain = None if self.inputs.target_greedy is None else self._full(0, jnp.int32)
        return Tables(zero, zero, certain, q, q, of_draft, of_draft, of_draft)
