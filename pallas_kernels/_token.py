"""The token rule: all rows are read in one launch and decided on in another, or both in one."""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import _config as config
from pallas_kernels import _launch as launching
from pallas_kernels import _waits as waits
from pallas_kernels._decision import Decision
from pallas_kernels._emission import groups_of
from pallas_kernels._launch import Known, Operands, make_operands
from pallas_kernels._sequence import Sequence
from pallas_kernels.types import Filter, Uniforms, Verification


def verify_token(
    target_logits: Float[Array, "B K1 V"],
    target_filter: Filter,
    draft_logits: Float[Array, "B K V"] | None,
    draft_filter: Filter,
    log_normalizers: Float[Array, "B K"] | None,
    tokens: Int[Array, "B K"],
    uniforms: Uniforms,
) -> Verification:
    """The token rule on a GPU, Hopper or newer.

    Accepts drafts while `log uniforms.accept < log p - log q`, then emits one token from max(p - q, 0), or from p after
    all drafts were accepted, by two-level inversion: `uniforms.emit` picks a tile of `TILE` tokens, then a token. A row
    drafts up to its first negative token; rows behind that are not read, but for the target's row there.
    Normalizers that were handed over take the place of reading the draft's rows; those larger than
    `LARGEST_LOG_NORMALIZER`, or NaN, do not.

    Logits are bfloat16, float16 or float32, of any V from `TILE` on; arithmetic is float32, exponentials are
    the hardware's (about 2 units in the last place).
    """
    batch_size, num_rows, vocab_size = target_logits.shape
    num_draft = num_rows - 1
    operands = make_operands(
        target_logits, target_filter, draft_logits, draft_filter, log_normalizers, tokens, uniforms
    )
    # The draft's rows are read with the target's, or where normalizers were handed over not at all.
    read_beside = operands.draft if operands.normalizers is None else None
    chosen = config.choose(batch_size, num_draft, vocab_size, read_beside is not None)
    early_exit = chosen.early_exit and num_draft > 0
    groups = groups_of(operands, vocab_size, chosen)
    lines, partials = (functools.partial(room, batch_size, num_rows) for room in (launching.lines, launching.partials))
    room_of = lines if early_exit else partials
    draft = None if read_beside is None else room_of(read_beside.dtype, vocab_size)
    of_target = operands.target.dtype, vocab_size
    known = Known(room_of(*of_target), draft, None, launching.facts(batch_size, num_rows), None)
    read = None
    grid, cluster = {"sequence": batch_size}, chosen.blocks
    if not early_exit:
        known = known._replace(lines=lines(*of_target), counters=launching.counters(batch_size))
        read = _read(operands, num_rows, known, vocab_size)
        grid, cluster = grid | {"block": chosen.blocks}, None

    def finish(given, made, shared, barrier):
        operands, read = given
        out, scratch = made
        tables, room, number = shared
        known = scratch if early_exit else read
        meeting = barrier if early_exit else waits.Arrivals(known.counters, number)
        place = room, meeting, vocab_size, groups, chosen.blocks
        sequence: Any = Decision(operands, out, *place, known=known, tables=tables, early_exit=early_exit)
        sequence.run()

    made = launching.results(batch_size, num_draft, groups.num_slots), known if early_exit else None
    shared = launching.tables(num_rows), launching.room_to_search(groups.num_slots), waits.number()
    out, _ = launching.launch(finish, (operands, read), made, grid, cluster, shared)
    return Verification(out.tokens, out.num_accepted, out.log_probs, out.accept_prob[:, :num_draft], out.status)


def _read(operands: Operands, num_rows: int, room: Known, vocab_size: int) -> Known:
    """Every chunk of every row that is drafted, each by a block of its own; and each drafted token's facts."""
    num_draft, batch_size = num_rows - 1, operands.emit.shape[0]

    refs = [operands.target] if room.draft is None else [operands.target, operands.draft]
    count = max(config.chunks(ref.dtype, vocab_size).count for ref in refs)
    num_slots = num_rows + (0 if room.draft is None else num_draft)

    def body(operands, known, shared, barrier):
        del shared, barrier
        waits.start_next()
        sequence = Sequence(operands, vocab_size)
        slot, chunk = lax.axis_index("row"), lax.axis_index("chunk")

        if num_draft:
            # By blocks of their own: others would wait for it before they read.
            @pl.when((chunk == count) & (slot < num_draft))
            def _():
                sequence.look_up(slot, known.facts)

        @pl.when((slot == 0) & (chunk == 0))
        def _():
            known.counters[sequence.sequence] = 0

        def read():
            of_target = (slot <= num_draft) & (chunk < sequence.num_chunks("target"))
            pl.when(of_target)(lambda: sequence.read("target", slot, chunk, known.target, known.lines))
            if known.draft is not None:
                of_draft = (slot > num_draft) & (chunk < sequence.num_chunks("draft"))
                pl.when(of_draft)(lambda: sequence.read("draft", slot - num_draft - 1, chunk, known.draft))

        if batch_size * num_slots * count <= config.READING * config.PROCESSORS:
            # Where all run at once, none waits to know what was drafted.
            read()
        else:
            pl.when(sequence.is_drafted(jnp.where(slot <= num_draft, slot, slot - num_draft)))(read)

    grid = {"sequence": batch_size, "row": num_slots, "chunk": count + (num_draft > 0)}
    return launching.launch(body, operands, room, grid)
