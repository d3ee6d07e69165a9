"""What goes into a kernel and comes out of it, and how it is launched."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _config as config
from pallas_kernels import _sums as summing
from pallas_kernels import _waits as waits
from pallas_kernels.types import TILE, Filter, Uniforms


class Operands(NamedTuple):
    """The inputs; rows of logits lie in flat arrays."""

    target: Any
    target_scale: Any
    target_cutoff: Any
    target_greedy: Any
    draft: Any
    draft_scale: Any
    draft_cutoff: Any
    draft_greedy: Any
    normalizers: Any
    tokens: Any
    accept: Any
    emit: Any


class Partials(NamedTuple):
    """What is known of every chunk of every row: the largest logit, the sum beside it, or where it is.

    Each is `[B, chunks, lanes]`, a row a lane (`config.row_lanes`): all rows are decided on at once.
    """

    top: Any
    total: Any
    first: Any


class Lines(NamedTuple):
    """The same, each `[B, rows, THREADS or a multiple]`, a chunk a lane: a row is decided on by itself."""

    top: Any
    total: Any
    first: Any


class Facts(NamedTuple):
    """What is looked up once for every drafted token, each `[B, lanes]`, a row a lane.

    Attributes:
      token: -1 from where nothing was drafted.
      target_logit: Of the token; -inf where it has none.
      draft_logit: The same of the draft.
      accept: The uniform.
      q_offset, q_log_sum: What makes a distribution of the draft's row, where normalizers were handed over.
    """

    token: Any
    target_logit: Any
    draft_logit: Any
    accept: Any
    q_offset: Any
    q_log_sum: Any


class Known(NamedTuple):
    """All that reading leaves behind.

    Attributes:
      target: `Partials`, or where rows are read one after the other `Lines`.
      draft: The same of the draft, where its rows are read.
      lines: `Lines` of the target beside its `Partials`, for the row that emits.
      facts: `Facts`.
      counters: Zeros, `[B]`, for the blocks of a sequence that count themselves; where rows are read before.
    """

    target: Any
    draft: Any
    lines: Any
    facts: Any
    counters: Any


class Tables(NamedTuple):
    """Numbers of every row in shared memory, each `[lanes]`: written a row a lane, read by the row's number."""

    token: Any
    p_offset: Any
    p_log_sum: Any
    p_certain: Any
    q_offset: Any
    q_log_sum: Any
    log_p: Any
    log_q: Any
    accept_prob: Any


class Results(NamedTuple):
    """The outputs, and `sums` of tiles: where one block of a sequence reads what the others wrote."""

    tokens: Any
    num_accepted: Any
    log_probs: Any
    accept_prob: Any
    status: Any
    sums: Any


def make_operands(
    target_logits, target_filter, draft_logits, draft_filter, log_normalizers, tokens, uniforms: Uniforms
) -> Operands:
    """The inputs, of the types that the kernels want; no row is copied."""
    num_draft = tokens.shape[1]
    if draft_logits is None or num_draft == 0:
        draft_logits, log_normalizers, draft_filter = None, None, Filter()

    def wide(x, dtype=jnp.float32):
        return None if x is None else x.astype(dtype)

    return Operands(
        target=target_logits.reshape(-1),
        target_scale=wide(target_filter.scale),
        target_cutoff=wide(target_filter.cutoff),
        target_greedy=wide(target_filter.greedy, jnp.int32),
        draft=None if draft_logits is None else draft_logits.reshape(-1),
        draft_scale=wide(draft_filter.scale),
        draft_cutoff=wide(draft_filter.cutoff),
        draft_greedy=wide(draft_filter.greedy, jnp.int32),
        normalizers=wide(log_normalizers),
        tokens=wide(tokens, jnp.int32) if num_draft else None,
        accept=wide(uniforms.accept) if num_draft else None,
        emit=wide(uniforms.emit),
    )


def partials(batch_size: int, num_rows: int, dtype: Any, vocab_size: int) -> Partials:
    """Room for what is known of every chunk, for rows that are read by a launch of their own."""
    return Partials(*_triple((batch_size, config.chunks(dtype, vocab_size).count, config.row_lanes(num_rows))))


def lines(batch_size: int, num_rows: int, dtype: Any, vocab_size: int) -> Lines:
    """Room for what is known of every chunk, for rows that are read one after the other."""
    return Lines(*_triple((batch_size, num_rows, config.in_lanes(config.chunks(dtype, vocab_size).count))))


def _triple(shape: tuple[int, ...]) -> list[Any]:
    return [jax.ShapeDtypeStruct(shape, of) for of in (jnp.float32, jnp.float32, jnp.int32)]


def facts(batch_size: int, num_rows: int) -> Facts:
    """Room for what is looked up."""
    shape = batch_size, config.row_lanes(num_rows)
    return Facts(jax.ShapeDtypeStruct(shape, jnp.int32), *(jax.ShapeDtypeStruct(shape, jnp.float32),) * 5)


def counters(batch_size: int) -> Any:
    """Room for a counter a sequence."""
    return jax.ShapeDtypeStruct((batch_size,), jnp.int32)


def tables(num_rows: int) -> Tables:
    """Room for the tables."""
    of, shape = {"token": jnp.int32, "p_certain": jnp.int32}, (config.row_lanes(num_rows),)
    return Tables(*(plgpu.SMEM(shape, of.get(name, jnp.float32)) for name in Tables._fields))


def room_to_search(num_slots: int) -> Any:
    """Room for running sums of as many numbers, or of a tile's."""
    return plgpu.SMEM((summing.BEFORE + max(TILE, config.in_lanes(num_slots)),), jnp.float32)


def results(batch_size: int, num_draft: int, num_slots: int) -> Results:
    """Room for what is decided, and for as many sums of tiles."""
    return Results(
        tokens=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.int32),
        num_accepted=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        log_probs=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.float32),
        accept_prob=jax.ShapeDtypeStruct((batch_size, max(num_draft, 1)), jnp.float32),
        status=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        sums=jax.ShapeDtypeStruct((batch_size, config.in_lanes(num_slots)), jnp.float32),
    )


def launch(
    body: Callable[..., None],
    inputs: Any,
    outputs: Any,
    grid: dict[str, int],
    cluster: int | None = None,
    shared: Any = (),
):
    """Runs `body(inputs, outputs, shared, barrier)` in every block of the grid, and returns the outputs.

    With a cluster the blocks of one place in the grid are numbered along the axis "block", and may meet.
    `shared` is what every block has of shared memory.
    """
    given, structure = jax.tree.flatten(inputs)
    wanted, out_structure = jax.tree.flatten(outputs)
    own, own_structure = jax.tree.flatten(shared)

    def flat_body(*refs):
        rest = iter(refs)
        parts = [
            jax.tree.unflatten(tree, [next(rest) for _ in range(tree.num_leaves)])
            for tree in (structure, out_structure, own_structure)
        ]
        body(*parts, next(rest, None))

    options: dict[str, Any] = {}
    scratch = list(own)
    if cluster is not None:
        options = {"cluster": (cluster,), "cluster_names": ("block",)}
        scratch += waits.cluster_barrier()
    kernel = plgpu.kernel(
        flat_body,
        out_type=tuple(wanted),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=summing.EXCHANGE_BYTES),
        **options,
    )
    return jax.tree.unflatten(out_structure, kernel(*given))
