"""What goes into a kernel and comes out of it, and how its blocks are launched and wait."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float

from pallas_kernels import _config as config


class Filter(NamedTuple):
    """Scale, cutoff and greedy rows of R rows a sequence; None: of no row.

    A logit x counts as `x * scale` where `x >= cutoff` and as -inf elsewhere; a greedy row is its first
    largest logit for certain, or, of the draft, its drafted token.
    """

    scale: Float[Array, "B"] | None = None
    cutoff: Float[Array, "B R"] | None = None
    greedy: Bool[Array, "B"] | None = None


class Flags(NamedTuple):
    """What is added to `status`.

    Attributes:
      degenerate_target: A target row in use holds NaN or +inf, or keeps nothing.
      degenerate_draft: The same of a draft row, or it gives its drafted token no probability.
      empty_residual: A draft was rejected where max(p - q, 0) is zero to the last bit.
    """

    degenerate_target: int
    degenerate_draft: int
    empty_residual: int


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

    Each is `[B, copies x chunks, THREADS]`, a row a lane.
    """

    top: Any
    total: Any
    first: Any


class Facts(NamedTuple):
    """What is looked up once for every drafted token, each `[B, THREADS]`, a row a lane."""

    token: Any
    target_logit: Any
    draft_logit: Any
    accept: Any
    normalizer: Any


class Known(NamedTuple):
    """All that reading leaves behind: two `Partials` and `Facts`."""

    target: Any
    draft: Any
    facts: Any


class Tables(NamedTuple):
    """Numbers of every row, `[B, blocks of the cluster, THREADS]`: written a row a lane, read by the row's number."""

    p_offset: Any
    p_log_sum: Any
    p_certain: Any
    q_offset: Any
    q_log_sum: Any
    log_p: Any
    log_q: Any
    accept_prob: Any


class Results(NamedTuple):
    """The outputs, and `sums`: where the first block of a cluster reads what the others wrote."""

    tokens: Any
    num_accepted: Any
    log_probs: Any
    accept_prob: Any
    status: Any
    sums: Any


def make_operands(
    target_logits, target_filter, draft_logits, draft_filter, log_normalizers, tokens, accept, emit
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
        accept=wide(accept) if num_draft else None,
        emit=wide(emit),
    )


def partials(batch_size: int, dtype: Any, vocab_size: int, copies: int) -> Partials:
    """Room for what is known of every chunk, as many copies of it as are in use at once."""
    shape = batch_size, copies * config.chunks(dtype, vocab_size).count, config.THREADS
    return Partials(*(jax.ShapeDtypeStruct(shape, of) for of in (jnp.float32, jnp.float32, jnp.int32)))


def facts(batch_size: int) -> Facts:
    """Room for what is looked up."""
    shape = batch_size, config.THREADS
    return Facts(jax.ShapeDtypeStruct(shape, jnp.int32), *(jax.ShapeDtypeStruct(shape, jnp.float32),) * 4)


def tables(batch_size: int, cluster: int) -> Tables:
    """Room for the tables."""
    shape = batch_size, cluster, config.THREADS
    room = Tables(*(jax.ShapeDtypeStruct(shape, jnp.float32),) * len(Tables._fields))
    return room._replace(p_certain=jax.ShapeDtypeStruct(shape, jnp.int32))


def results(batch_size: int, num_draft: int, vocab_size: int) -> Results:
    """Room for what is decided."""
    num_tiles = -(-vocab_size // config.TILE)
    return Results(
        tokens=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.int32),
        num_accepted=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        log_probs=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.float32),
        accept_prob=jax.ShapeDtypeStruct((batch_size, max(num_draft, 1)), jnp.float32),
        status=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        # Some tiles are added up at once, and the search wants a power of two.
        sums=jax.ShapeDtypeStruct((batch_size, max(config.THREADS, 1 << num_tiles.bit_length())), jnp.float32),
    )


def launch(body: Callable[..., None], inputs: Any, outputs: Any, grid: dict[str, int], cluster: int | None = None):
    """Runs `body(inputs, outputs, barrier)` in every block of the grid, and returns the outputs.

    With a cluster the blocks of one place in the grid are numbered along the axis "block" and have a barrier.
    """
    given, structure = jax.tree.flatten(inputs)
    wanted, out_structure = jax.tree.flatten(outputs)

    def flat_body(*refs):
        barrier = None if cluster is None else refs[-1]
        rest = refs if cluster is None else refs[:-1]
        body(
            jax.tree.unflatten(structure, rest[: len(given)]),
            jax.tree.unflatten(out_structure, rest[len(given) :]),
            barrier,
        )

    options: dict[str, Any] = {}
    if cluster is not None:
        options = {
            "cluster": (cluster,),
            "cluster_names": ("block",),
            "scratch_types": [plgpu.ClusterBarrier(collective_axes=("block",))],
        }
    kernel = plgpu.kernel(
        flat_body,
        out_type=tuple(wanted),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **options,
    )
    return jax.tree.unflatten(out_structure, kernel(*given))


def fence():
    """What any thread of the block wrote is seen by the cluster before what any of them does next."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
        mosaic.warpgroup_barrier()

    emit()
