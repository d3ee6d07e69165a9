"""Samples one token per row of many rows, without filters, in the two launches of the token rule (`token`).

A row without drafts is a bonus row: `token_read` reads it in chunks, in blocks that do not wait for each other, and
`token_emit` picks a chunk, a tile and a token. In `sample`, the blocks of a row wait for each other twice, which takes
longer once the rows fill the GPU.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import config as sizes
from pallas_kernels import random, rows, token
from pallas_kernels.limits import Limits, RowLimits, maybe_on, row_limits, static_limits
from pallas_kernels.types import Filter


def supports(limits: Limits) -> bool:
    """Whether `sample` takes these parameters: a temperature above 0 that is a number, and no filter."""
    is_number = static_limits(limits).temperature is not None
    return is_number and maybe_on(limits)[1:] == (None, None, None) and _row_limits(limits).greedy is None


def sample(
    logits: Float[Array, "B V"], limits: Limits, noise: random.Noise, *, config: sizes.Config | None = None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """Samples like `sample.sample`, with `limits` that `supports` accepts and any V of at least `TILE`."""
    batch_size, vocab_size = logits.shape
    config = config or sizes.sample_config(logits.dtype, batch_size, vocab_size)
    scale = _row_limits(limits).scale
    drafts = jnp.zeros((batch_size, 0), jnp.int32)
    inputs = rows.make_inputs(logits[:, None], Filter(), None, Filter(), None, drafts, noise)

    def view(inputs):
        sequence = rows.sequence_view(inputs, vocab_size)
        # In the kernel the scale is a number, not an array that XLA would have to write.
        return sequence._replace(target=sequence.target._replace(filter=Filter(scale)))

    def decide(inputs, read):
        sequence = view(inputs)
        return sequence, *token.decide_all(sequence, read, config.max_unrolled)

    def write(emission, tables, stop, row):
        del tables, row
        offset = stop.p_offset if scale is None else stop.p_offset * scale
        emission.outputs.accept_prob[emission.sequence.number, 0] = offset + stop.p_log_sum

    read = token.read_rows(inputs, batch_size, 1, vocab_size, view)
    out = token.emit_after(
        read, inputs, decide, lambda read: read.target_by_row, batch_size, 1, vocab_size, config, write
    )
    return out.tokens[:, 0], out.accept_prob[:, 0]


def _row_limits(limits: Limits) -> RowLimits:
    """The parameters of all rows, which are numbers."""
    return row_limits(static_limits(limits), Limits(*[None] * len(limits)), 0)
