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
    """What is known of every chunk of R rows a sequence: the largest logit, the sum beside it, or where it is."""

    top: Any
    total: Any
    first: Any


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


def lane_width(count: int) -> int:
    """The least power of two of elements that a block loads at once, one or more a thread."""
    return max(config.THREADS, 1 << (count - 1).bit_length())


def partials(batch_size: int, num_rows: int, dtype: Any, vocab_size: int) -> Partials:
    """Room for what is known of every chunk."""
    shape = batch_size, num_rows, lane_width(config.chunks(dtype, vocab_size).count)
    return Partials(
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.int32),
    )


def results(batch_size: int, num_draft: int, dtype: Any, vocab_size: int) -> Results:
    """Room for what is decided."""
    num_sums = -(-vocab_size // (config.TILE * config.span(dtype)))
    return Results(
        tokens=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.int32),
        num_accepted=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        log_probs=jax.ShapeDtypeStruct((batch_size, num_draft + 1), jnp.float32),
        accept_prob=jax.ShapeDtypeStruct((batch_size, max(num_draft, 1)), jnp.float32),
        status=jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        sums=jax.ShapeDtypeStruct((batch_size, lane_width(num_sums)), jnp.float32),
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
