"""A launch of one cluster of blocks a sequence: what goes in, what comes out, and how blocks wait."""

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


class Operands(NamedTuple):
    """The kernel's inputs; rows of logits lie in flat arrays."""

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
    num_drafted: Any
    log_uniforms: Any
    uniforms: Any


class Results(NamedTuple):
    """The kernel's outputs; the last ones are where blocks of a cluster read what others wrote."""

    ints: Any
    log_prob: Any
    draft_log_probs: Any
    log_ratios: Any
    largest: Any
    total: Any
    first: Any
    sums: Any


def flatten(logits: Float[Array, "B R V"]) -> Float[Array, "N"]:
    """Rows one after the other; no copy."""
    return logits.reshape(-1)


def make_operands(
    target_logits,
    target_filter,
    draft_logits,
    draft_filter,
    log_normalizers,
    tokens,
    num_drafted,
    log_uniforms,
    uniforms,
) -> Operands:
    """The kernel's inputs, of the types it wants; no row is copied."""
    num_draft = tokens.shape[1]
    if draft_logits is None or num_draft == 0:
        draft_logits, log_normalizers, draft_filter = None, None, Filter()

    def wide(x, dtype):
        return None if x is None else x.astype(dtype)

    return Operands(
        target=flatten(target_logits),
        target_scale=wide(target_filter.scale, jnp.float32),
        target_cutoff=wide(target_filter.cutoff, jnp.float32),
        target_greedy=wide(target_filter.greedy, jnp.int32),
        draft=None if draft_logits is None else flatten(draft_logits),
        draft_scale=wide(draft_filter.scale, jnp.float32),
        draft_cutoff=wide(draft_filter.cutoff, jnp.float32),
        draft_greedy=wide(draft_filter.greedy, jnp.int32),
        normalizers=wide(log_normalizers, jnp.float32),
        tokens=tokens.astype(jnp.int32) if num_draft else None,
        num_drafted=num_drafted.astype(jnp.int32),
        log_uniforms=log_uniforms.astype(jnp.float32) if num_draft else None,
        uniforms=uniforms.astype(jnp.float32),
    )


def launch(sequence_type: Callable[..., Any], operands: Operands, shape: tuple[int, ...]) -> Results:
    """Runs `sequence_type(...).run()` in every block of a cluster a sequence."""
    batch_size, num_rows, vocab_size = shape
    num_draft = num_rows - 1
    chosen = config.choose(batch_size, num_draft, vocab_size)
    num_tiles = -(-vocab_size // config.TILE)
    # A power of two for the bisection, and at least one element a thread.
    num_sums = max(config.THREADS, 1 << (num_tiles - 1).bit_length())
    cluster = chosen.cluster
    drafts = (batch_size, max(num_draft, 1))
    shares = (batch_size, 2 * num_rows, cluster)
    out_type = Results(
        ints=jax.ShapeDtypeStruct((batch_size, 5), jnp.int32),
        log_prob=jax.ShapeDtypeStruct((batch_size,), jnp.float32),
        draft_log_probs=jax.ShapeDtypeStruct(drafts, jnp.float32),
        log_ratios=jax.ShapeDtypeStruct(drafts, jnp.float32),
        largest=jax.ShapeDtypeStruct(shares, jnp.float32),
        total=jax.ShapeDtypeStruct(shares, jnp.float32),
        first=jax.ShapeDtypeStruct(shares, jnp.int32),
        sums=jax.ShapeDtypeStruct((batch_size, num_sums), jnp.float32),
    )
    given, structure = jax.tree.flatten(operands)

    def body(*refs):
        barrier = refs[-1]
        inputs = jax.tree.unflatten(structure, refs[: len(given)])
        sequence_type(inputs, Results(*refs[len(given) : -1]), barrier, vocab_size, chosen).run()

    kernel = plgpu.kernel(
        body,
        out_type=tuple(out_type),
        grid=(batch_size,),
        grid_names=("sequence",),
        cluster=(cluster,),
        cluster_names=("block",),
        scratch_types=[plgpu.ClusterBarrier(collective_axes=("block",))],
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return Results(*kernel(*given))


def fence():
    """What any thread of the block wrote is seen by the cluster before what any of them does next."""

    @plgpu.inline_mgpu()
    def emit(*context):
        del context
        mosaic.inline_ptx("fence.acq_rel.cluster;", has_side_effects=True)
        mosaic.warpgroup_barrier()

    emit()
