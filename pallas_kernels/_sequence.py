"""One sequence as a block sees it: where its rows lie, what is done to them, and how their chunks are read."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import _chunks as chunks
from pallas_kernels import _config as config
from pallas_kernels._launch import Facts, Operands, Partials


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
        """Writes down what is to be known of one drafted token; a logit of -inf where it has none."""
        inputs, place = self.inputs, (self.sequence, row)
        token = inputs.tokens[place]
        facts.token[place] = token
        facts.accept[place] = inputs.accept[place]
        for of in ("target", "draft"):
            if getattr(inputs, of) is not None:
                x, outside = self.logit(of, row, token)
                getattr(facts, f"{of}_logit")[place] = jnp.where(outside, -jnp.inf, x)
        if inputs.normalizers is not None:
            facts.normalizer[place] = inputs.normalizers[place]

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

    def read(self, of: str, row: Any, chunk: Any, known: Partials, copy: Any = 0):
        """Reads one chunk of a row, and writes down what is to be known of it, in one copy of several."""
        ref, place = getattr(self.inputs, of), (self.sequence, copy * self.num_chunks(of) + chunk, row)
        flat_row = self.row(of, row)

        def soft():
            scale, cutoff = self.filter(of, row)
            known.top[place], known.total[place] = chunks.log_sum(ref, self.vocab_size, flat_row, chunk, scale, cutoff)

        def greedy():
            known.top[place], known.first[place] = chunks.first_largest(ref, self.vocab_size, flat_row, chunk)

        # A greedy draft is certain of its token; only the target's first largest logit has to be found.
        is_greedy = self.inputs.target_greedy if of == "target" else None
        if is_greedy is None:
            soft()
        else:
            pl.when(is_greedy[self.sequence] > 0)(greedy)
            pl.when(is_greedy[self.sequence] == 0)(soft)
