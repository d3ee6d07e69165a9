"""The token rule: all rows are read in one launch and decided on in another, or both in one."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _config as config
from pallas_kernels import _launch as launching
from pallas_kernels._decision import Decision
from pallas_kernels._launch import Filter, Flags, Operands, Partials, make_operands
from pallas_kernels._sequence import Sequence


class TokenResult(NamedTuple):
    """What the token rule decides for B sequences.

    Attributes:
      tokens: The accepted drafts, then one more token, then -1.
      num_accepted: How many drafts were accepted.
      log_probs: log p of each emitted token, 0 at padding, -inf from a degenerate row.
      accept_prob: min(1, p/q) of each draft, 0 where nothing was drafted, or where its row was not read because
        a draft before it was rejected.
      status: The sum of the flags that hold.
    """

    tokens: Int[Array, "B K1"]
    num_accepted: Int[Array, "B"]
    log_probs: Float[Array, "B K1"]
    accept_prob: Float[Array, "B K"]
    status: Int[Array, "B"]


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    log_normalizers: Float[Array, "B K"] | None,
    tokens: Int[Array, "B K"],
    accept: Float[Array, "B K"],
    emit: Float[Array, "B 2"],
    *,
    largest_normalizer: float,
    flags: Flags,
) -> TokenResult:
    """The token rule on a GPU, Hopper or newer.

    Accepts drafts while `log accept < log p - log q`, then emits one token from max(p - q, 0), or from p after
    all drafts were accepted, by two-level inversion: `emit` picks a tile of `TILE` tokens, then a token. A row
    drafts up to its first negative token; rows behind that are not read, but for the target's row there.
    Normalizers that were handed over take the place of reading the draft's rows; those larger than
    `largest_normalizer`, or NaN, do not.

    Logits are bfloat16, float16 or float32, of any V from `TILE` on; arithmetic is float32, exponentials are
    the hardware's (about 2 units in the last place).
    """
    batch_size, num_rows, vocab_size = target_logits.shape
    num_draft = num_rows - 1
    operands = make_operands(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, tokens, accept, emit
    )
    chosen = config.choose(batch_size, num_draft, vocab_size)
    early_exit = chosen.early_exit and num_draft > 0
    room = functools.partial(launching.partials, batch_size, vocab_size=vocab_size)
    target_room = room(num_rows, operands.target.dtype)
    draft_room = None if operands.draft is None else room(num_draft, operands.draft.dtype)
    results = launching.results(batch_size, num_draft, operands.target.dtype, vocab_size)
    decision = functools.partial(Decision, largest_normalizer=largest_normalizer, flags=flags)

    def finish(given, made, barrier):
        operands, read = given
        out, scratch = made
        known = [a if a is not None else b for a, b in zip(read, scratch, strict=True)]
        sequence = decision(operands, out, barrier, vocab_size, chosen.cluster, known)
        sequence.read_and_emit() if early_exit else sequence.emit()

    if early_exit:
        read, scratch = (None, None), (target_room, draft_room)
    elif operands.draft is None or operands.normalizers is not None:
        read, scratch = (_read(operands, target_room, None, vocab_size)[0], None), (None, draft_room)
    else:
        read, scratch = _read(operands, target_room, draft_room, vocab_size), (None, None)
    given, made = (operands, read), (results, scratch)
    out, _ = launching.launch(finish, given, made, {"sequence": batch_size}, chosen.cluster)
    return TokenResult(*out[:3], out.accept_prob[:, :num_draft], out.status)


def _read(operands: Operands, target_room: Partials, draft_room: Partials | None, vocab_size: int) -> Any:
    """Every chunk of every row that is drafted, each by a block of its own; what is to be known of them."""
    batch_size, num_rows, _ = target_room.top.shape
    num_draft = num_rows - 1
    # What reading does not need is no input, so that XLA need not have made it.
    needed = operands._replace(normalizers=None, accept=None, emit=None)
    if draft_room is None:
        needed = needed._replace(draft=None, draft_scale=None, draft_cutoff=None, draft_greedy=None)

    def body(operands, known, barrier):
        del barrier
        sequence = Sequence(operands, vocab_size)
        slot, chunk = lax.axis_index("row"), lax.axis_index("chunk")
        _, num_drafted = sequence.tokens()
        num_needed = jnp.where(slot <= num_draft, slot, slot - num_draft)

        @pl.when(num_drafted >= num_needed)
        def _():
            of_target = (slot <= num_draft) & (chunk < sequence.num_chunks("target"))
            pl.when(of_target)(lambda: sequence.read("target", slot, chunk, known[0]))
            if draft_room is not None:
                of_draft = (slot > num_draft) & (chunk < sequence.num_chunks("draft"))
                pl.when(of_draft)(lambda: sequence.read("draft", slot - num_draft - 1, chunk, known[1]))

    refs = [operands.target] if draft_room is None else [operands.target, operands.draft]
    count = max(config.chunks(ref.dtype, vocab_size).count for ref in refs)
    num_slots = num_rows + (0 if draft_room is None else num_draft)
    grid = {"sequence": batch_size, "row": num_slots, "chunk": count}
    return launching.launch(body, needed, (target_room, draft_room), grid)
