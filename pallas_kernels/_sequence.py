"""One sequence as a block sees it: where its rows lie, what is done to them, and how their chunks are read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _chunks as chunks
from pallas_kernels import _config as config
from pallas_kernels import _rows as rows
from pallas_kernels._launch import Facts, Lines, Operands, Partials
from pallas_kernels.types import LARGEST_LOG_NORMALIZER, TILE


class Sequence:
    """One sequence.

    Attributes:
      inputs: Of all sequences.
      vocab_size: V.
      num_draft: K.
      sequence: Its number.
    """

    def __init__(self, inputs: Operands, vocab_size: int):
        self.inputs, self.vocab_size = inputs, vocab_size
        self.num_draft = 0 if inputs.tokens is None else inputs.tokens.shape[1]
        self.sequence = lax.axis_index("sequence")

    def is_drafted(self, row: jax.Array) -> jax.Array:
        """Whether the first `row` tokens were all drafted."""
        holds = jnp.bool_(True)
        for i in range(self.num_draft):
            holds = holds & ((self.inputs.tokens[self.sequence, i] >= 0) | (i >= row))
        return holds

    def look_up(self, row: jax.Array, facts: Facts):
        """Writes down what is to be known of one drafted token; a logit of -inf where it has none.

        Of a normalizer that was handed over and cannot be used the row is read here, by one block: it is rare.
        """
        inputs, place = self.inputs, (self.sequence, row)
        # All is asked for before anything is written, and waited for once.
        token, accept = inputs.tokens[place], inputs.accept[place]
        normalizer = None if inputs.normalizers is None else inputs.normalizers[place]
        is_drafted = self.is_drafted(row + 1)
        there = [of for of in ("target", "draft") if getattr(inputs, of) is not None]
        logits = [self.logit(of, row, token) for of in there]
        for of, (x, outside) in zip(there, logits, strict=True):
            getattr(facts, f"{of}_logit")[place] = jnp.where(outside, -jnp.inf, x)
        facts.token[place] = jnp.where(is_drafted, token, -1)
        facts.accept[place] = accept
        if normalizer is not None:
            # Whether it is a number, and precise enough to be subtracted.
            usable = (jnp.abs(normalizer) <= LARGEST_LOG_NORMALIZER) | ~is_drafted
            handed_over = jnp.float32(0), normalizer
            offset, log_sum = lax.cond(usable, lambda: handed_over, lambda: self._draft_row_at_once(row))
            facts.q_offset[place], facts.q_log_sum[place] = offset, log_sum

    def _draft_row_at_once(self, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maximum and logarithm of the sum of one of the draft's rows, by one block."""
        scale, cutoff = self.filter("draft", row)
        rate = rows.rate(scale)

        def one(tile, x, carry):
            top, total = carry
            x = rows.only_inside(x.astype(jnp.float32), tile, -jnp.inf)
            both = jnp.maximum(top, x)
            weight = jnp.exp2((x - both) * rate)
            weight = weight if cutoff is None else jnp.where(x >= cutoff, weight, 0.0)
            return both, total * jnp.exp2((top - both) * rate) + weight

        tops, totals = self.fold_tiles("draft", row, one, (rows.LOWEST, 0.0))
        top = jnp.max(tops)
        return top, jnp.log(jnp.sum(totals * jnp.exp2((tops - top) * rate)))

    def fold_tiles(self, of: str, row: Any, fn: Any, start: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        """`fn(tile, logits, carry)` of every tile of a row in turn; of few registers, for what is rare."""
        first, _ = self.load_tile([(of, row)], jnp.int32(0))

        def one(number, carry):
            tile, (x,) = self.load_tile([(of, row)], number)
            return fn(tile, x, carry)

        carry = tuple(plgpu.layout_cast(jnp.full((TILE,), value), first.layout) for value in start)
        return lax.fori_loop(0, config.num_tiles(self.vocab_size), one, carry)

    def load_tile(self, of_rows: list[tuple[str, Any]], number: Any, in_shared: bool = False):
        """The tile of that number, and its logits in each of some rows."""
        places = [(getattr(self.inputs, of), self.row(of, row)) for of, row in of_rows]
        tile = rows.tile_at(number, self.vocab_size, places, in_shared)
        return tile, [rows.load_tile(ref, self.vocab_size, row, tile) for ref, row in places]

    def filter(self, of: str, row: Any) -> tuple[Any, Any]:
        """Scale and cutoff of a row of the target or the draft."""
        scale, cutoff = (getattr(self.inputs, f"{of}_{name}") for name in ("scale", "cutoff"))
        return (
            None if scale is None else scale[self.sequence],
            None if cutoff is None else cutoff[self.sequence, row],
        )

    def row(self, of: str, row: Any) -> jax.Array:
        """A row's number in the flat array."""
        return self.sequence * (self.num_draft + (of == "target")) + row

    def draft_row(self, row: Any) -> Any:
        """The draft's row beside a target's; any where there is none."""
        return jnp.minimum(row, max(self.num_draft - 1, 0))

    def logit(self, of: str, row: Any, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The logit of one token, and whether there is none: outside of the vocabulary, or cut off."""
        outside = (token < 0) | (token >= self.vocab_size)
        at = self.row(of, row) * self.vocab_size + jnp.where(outside, 0, token)
        x = getattr(self.inputs, of)[at].astype(jnp.float32)
        _, cutoff = self.filter(of, row)
        return x, outside if cutoff is None else outside | (x < cutoff)

    def num_chunks(self, of: str) -> int:
        """Chunks of a row."""
        return config.chunks(getattr(self.inputs, of).dtype, self.vocab_size).count

    def read(self, of: str, row: Any, chunk: Any, *known: Partials | Lines):
        """Reads one chunk of a row, and writes down in each of `known` what is to be known of it."""
        ref, flat_row = getattr(self.inputs, of), self.row(of, row)

        def write(name, value):
            for room in known:
                place = (row, chunk) if isinstance(room, Lines) else (chunk, row)
                getattr(room, name)[self.sequence, *place] = value

        def soft():
            scale, cutoff = self.filter(of, row)
            top, total = chunks.log_sum(ref, self.vocab_size, flat_row, chunk, scale, cutoff)
            write("top", top)
            write("total", total)

        def greedy():
            top, first = chunks.first_largest(ref, self.vocab_size, flat_row, chunk)
            write("top", top)
            write("first", first)

        # A greedy draft is certain of its token; only the target's first largest logit has to be found.
        is_greedy = self.inputs.target_greedy if of == "target" else None
        if is_greedy is None:
            soft()
        else:
            pl.when(is_greedy[self.sequence] > 0)(greedy)
            pl.when(is_greedy[self.sequence] == 0)(soft)
