"""Joint sums of several vectors, and choices: the first index at which a running sum exceeds a bound."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith
from jax.experimental.mosaic.gpu import FragmentedArray
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptx, tiles
from pallas_kernels.config import THREADS, WARP

WARPS = THREADS // WARP
"""Warps of a block."""

MAX_LOADS = 16
"""Maximum loads per thread of the weights of `choose`: 2,048 sums of tiles. The largest vocabulary has 1,954."""

MAX_SUMMED = 8
"""Maximum vectors of `sum_tiles`."""

LEAST_WEIGHT = 2.0**-80
"""Weight of a tile or chunk, relative to the largest logit of its row, that counts as 0: no uniform but 0 reaches it,
and its probabilities may round to zeros."""

HELD = 8
"""Elements at the end of `choose_scratch` that `hold` uses."""

EXCHANGE_BYTES = 16 * 4 * 32 * 4
"""Bytes of shared memory in which warps exchange partial sums: 16 float32 sums, each from 4 warps of 32 lanes."""


def stack_layout(vec: int) -> Any:
    """Layout of n stacked vectors, `[n, m]`, of which each thread holds `vec` adjacent elements per load."""
    tiling = plgpu.Tiling(((1, THREADS * vec), (32 * vec,), (vec,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def sum_vectors(vectors: list[jax.Array], vec: int) -> jax.Array:
    """Sums of n vectors, `[n]`, with one exchange between warps for all of them instead of one barrier per sum."""
    shape = len(vectors), *vectors[0].shape
    number = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=stack_layout(vec))
    stack = None
    for i, x in enumerate(vectors):
        # A row of the stack has the registers of its vector: the compiler removes the selection.
        wide = plgpu.layout_cast(lax.broadcast_in_dim(x, shape, (1,)), stack_layout(vec))
        stack = wide if stack is None else jnp.where(number == i, wide, stack)
    assert stack is not None
    return jnp.sum(stack, axis=1)


def vector_numbers(count: int, vec: int) -> jax.Array:
    """The integers 0 to n - 1 in the layout of the result of `sum_vectors`."""
    return plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=stack_layout(vec).reduce(1))


def to_scalars(sums: jax.Array, vec: int) -> list[jax.Array]:
    """The `[n]` sums that `sum_vectors` returns as n scalars, which every thread holds."""
    number = vector_numbers(sums.shape[0], vec)
    return [jnp.sum(jnp.where(number == i, sums, 0.0)) for i in range(sums.shape[0])]


def sum_tiles_scratch() -> Any:
    """Shared memory for `sum_tiles`."""
    return plgpu.SMEM((WARPS * MAX_SUMMED,), jnp.float32)


def sum_tiles(scratch: Any, vectors: list[jax.Array], top: jax.Array, totals: Any, tops: Any, layout: Any) -> jax.Array:
    """Writes the sum of each of n vectors to `totals` and `top` to `tops`, `[n]` in global memory; returns their sum.

    With one barrier for all of them, and few shuffles: each step halves the number of sums that a lane keeps. At most
    `MAX_SUMMED` vectors.
    """
    count = len(vectors)
    arg_types = (*(layout,) * count, plgpu.Layout.WG_SPLAT, *(plgpu.RefType(),) * 3)
    result = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.float32), layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=result)
    def emit(context, *arguments):
        del context
        *vectors, top, totals, tops, scratch = arguments
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
        _, warp, lane = ptx.thread_warp_lane()
        sums = [_running_sums([x for r in each.registers.flat for x in ptx.elements(r)])[-1] for each in vectors]
        sums += [zero] * (MAX_SUMMED - len(sums))
        distance = WARP // 2
        while len(sums) > 1:
            is_upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, ptx.constant(distance)), ptx.constant(0))
            half = len(sums) // 2
            pairs = list(zip(sums[:half], sums[half:], strict=True))
            kept = [arith.select(is_upper, high, low) for low, high in pairs]
            sent = [arith.select(is_upper, low, high) for low, high in pairs]
            sums = [arith.addf(k, ptx.exchange(s, distance)) for k, s in zip(kept, sent, strict=True)]
            distance //= 2
        total = sums[0]
        while distance:
            total = arith.addf(total, ptx.exchange(total, distance))
            distance //= 2
        # Lane 4 i of each warp holds its sum of vector i.
        address, number = ptx.address(scratch), arith.shrui(lane, ptx.constant(2))
        slot = arith.addi(arith.muli(warp, ptx.constant(MAX_SUMMED)), number)
        ptx.store_if("eq", arith.andi(lane, ptx.constant(3)), 0, "shared", _byte_address(address, slot), total)
        mosaic.warpgroup_barrier()
        # Lane i + 8 j reads the sum of vector i in warp j; every warp adds them up.
        total = ptx.load_shared("f32", _byte_address(address, lane), f32)
        for distance in (MAX_SUMMED, 2 * MAX_SUMMED):
            total = arith.addf(total, ptx.exchange(total, distance))
        for ref, value in ((totals, total), (tops, top.registers.item())):
            ptx.store_if("lt", mosaic.thread_idx(), count, "global", ptx.global_address(ref, lane), value)
        for distance in (1, 2, 4):
            total = arith.addf(total, ptx.exchange(total, distance))
        return FragmentedArray.splat(total, ())

    total: Any = emit(*vectors, top, totals, tops, scratch)
    return total


def _byte_address(address: Any, index: Any) -> Any:
    """Address of an element of 4 bytes."""
    return arith.addi(address, arith.muli(index, ptx.constant(4)))


def warp_min(values: jax.Array) -> jax.Array:
    """The least of `[WARP]` int32 values, of which every warp holds a copy, in one instruction."""
    result = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.int32), layout=plgpu.Layout.WG_SPLAT)

    @plgpu.inline_mgpu(arg_types=(tiles.lane_layout(WARP),), return_type=result)
    def emit(context, *arguments):
        del context
        (value,) = ptx.elements(arguments[0].registers.item())
        least = ptx.inline("redux.sync.min.s32 $0, $1, 0xffffffff;", value, result=ptx.int32())
        return FragmentedArray.splat(least, (), is_signed=True)

    least: Any = emit(values)
    return least


MAX_CHOICES = 8
"""Maximum choices that `choose_each` makes together."""


def choose_scratch() -> Any:
    """Shared memory for `choose`, `choose_each` and `hold`."""
    return plgpu.SMEM((MAX_LOADS * WARPS + MAX_CHOICES * WARPS + HELD,), jnp.float32)


def hold(scratch: Any, values: list[jax.Array]) -> list[jax.Array]:
    """Returns at most `HELD` scalars, computed here: without this, the compiler moves the computation to their use."""
    start = scratch.shape[0] - HELD
    for i, value in enumerate(values):
        # Registers -> shared memory: one float32. A store is not moved over the barriers that follow.
        scratch[start + i] = value
    return [scratch[start + i] for i in range(len(values))]


class Choice(NamedTuple):
    """The index of a chosen weight, and the sum of all weights."""

    number: jax.Array
    total: jax.Array


def choose(scratch: Any, weights: jax.Array, uniform: jax.Array, layout: Any) -> Choice:
    """The first index of a positive weight at which the running sum exceeds `uniform` times the sum of all weights.

    If rounding leaves no such index, the last positive weight; if no weight is positive, -1.

    Args:
      scratch: Shared memory, from `choose_scratch`.
      weights: `[n]` float32 in registers. Each thread holds adjacent weights per load, in the order of the threads.
      uniform: At least 0 and less than 1.
      layout: The layout of the weights, with at most `MAX_LOADS` loads per thread.
    """
    return choose_each(scratch, [weights], [uniform], layout)[0]


def choose_each(scratch: Any, weights: list[jax.Array], uniforms: list[jax.Array], layout: Any) -> list[Choice]:
    """`choose` for each of several vectors of weights, in two barriers for all of them.

    Every thread adds the weights that it holds of a load, a warp adds those of its threads by shuffles, and the warps
    exchange their sums in shared memory. With a second exchange, of the best index of each warp, that takes two
    barriers. The vectors together have at most `MAX_LOADS` loads per thread, and are at most `MAX_CHOICES`.
    """
    n, count = weights[0].shape[0], len(weights)
    dtypes = (jnp.dtype(jnp.int32),) * count + (jnp.dtype(jnp.float32),) * count
    results = [plgpu.ShapeDtypeStruct((), dtype, layout=plgpu.Layout.WG_SPLAT) for dtype in dtypes]
    arg_types = (*(layout,) * count, *(plgpu.Layout.WG_SPLAT,) * count, plgpu.RefType())

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=tuple(results))
    def emit(context, *arguments):
        del context
        weights, uniforms, scratch = arguments[:count], arguments[count:-1], arguments[-1]
        address = ptx.address(scratch)
        lanes = ptx.thread_warp_lane()
        loads = [[ptx.elements(register) for register in each.registers.flat] for each in weights]
        if count * len(loads[0]) > MAX_LOADS or count > MAX_CHOICES:
            raise ValueError(
                f"a thread may hold at most {MAX_LOADS} loads of at most {MAX_CHOICES} vectors of weights; it holds "
                f"{count} of {len(loads[0])}"
            )

        def slot_address(slot, of_warp):
            return arith.addi(arith.addi(address, ptx.constant(4 * WARPS * slot)), arith.muli(of_warp, ptx.constant(4)))

        summed = [_sum_in_warps(each, i * len(each), slot_address, lanes) for i, each in enumerate(loads)]
        mosaic.warpgroup_barrier()
        totals = []
        for i, (each, sums, uniform) in enumerate(zip(loads, summed, uniforms, strict=True)):
            best, total = _best_index(each, sums, uniform.registers.item(), n, i * len(each), slot_address, lanes)
            ptx.store_from_lane(0, "s32", lanes[2], slot_address(MAX_LOADS + i, lanes[1]), best)
            totals.append(total)
        mosaic.warpgroup_barrier()
        numbers = [_join_warps(n, MAX_LOADS + i, slot_address) for i in range(count)]
        splats = [FragmentedArray.splat(number, (), is_signed=True) for number in numbers]
        return *splats, *(FragmentedArray.splat(total, ()) for total in totals)

    chosen: Any = emit(*weights, *uniforms, scratch)
    return [Choice(chosen[i], chosen[count + i]) for i in range(count)]


class _Sums(NamedTuple):
    """Sums of one vector's loads: the running sums in a thread, and the sum over the threads before it in its warp."""

    running: list[list[Any]]
    before: list[Any]


def _sum_in_warps(loads: list[list[Any]], first_slot: int, slot_address: Any, lanes: Any) -> _Sums:
    """Sums the loads of a vector, and writes each warp's sum of load i to slot `first_slot + i`."""
    _, warp, lane = lanes
    f32 = ir.F32Type.get()
    running = [_running_sums(load) for load in loads]
    inclusive = [ptx.prefix_sum(sums[-1], "f32", f32) for sums in running]
    for i, sums in enumerate(inclusive):
        ptx.store_from_lane(WARP - 1, "f32", lane, slot_address(first_slot + i, warp), sums)
    return _Sums(running, [ptx.inline(_PREVIOUS_LANE, sums, result=f32) for sums in inclusive])


def _best_index(loads, sums: _Sums, uniform: Any, n: int, first_slot: int, slot_address: Any, lanes: Any):
    """The rank of the best index in a warp, and the sum of all weights.

    An index i beyond the bound has rank 2n - i, any other has rank i. So the largest rank is that of the first index
    beyond the bound or, if there is none, of the last index.
    """
    thread, warp, _ = lanes
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    total, before = zero, []
    for i in range(len(loads)):
        of_warps = [ptx.load_shared("f32", slot_address(first_slot + i, ptx.constant(j)), f32) for j in range(WARPS)]
        start = total
        for j, of_warp in enumerate(of_warps):
            lower = arith.cmpi(arith.CmpIPredicate.ult, ptx.constant(j), warp)
            start = arith.addf(start, arith.select(lower, of_warp, zero))
            total = arith.addf(total, of_warp)
        before.append(arith.addf(start, sums.before[i]))
    bound = arith.mulf(uniform, total)
    best, size = ptx.constant(-1), len(loads[0])
    own = arith.muli(thread, ptx.constant(size))
    for i, (load, running) in enumerate(zip(loads, sums.running, strict=True)):
        for j, (weight, local) in enumerate(zip(load, running, strict=True)):
            index = arith.addi(own, ptx.constant(i * THREADS * size + j))
            beyond = arith.cmpf(arith.CmpFPredicate.OGT, arith.addf(before[i], local), bound)
            rank = arith.select(beyond, arith.subi(ptx.constant(2 * n), index), index)
            positive = arith.cmpf(arith.CmpFPredicate.OGT, weight, zero)
            best = arith.maxsi(best, arith.select(positive, rank, ptx.constant(-1)))
    return ptx.inline("redux.sync.max.s32 $0, $1, 0xffffffff;", best, result=ptx.int32()), total


def _join_warps(n: int, slot: int, slot_address: Any) -> Any:
    """The index of the largest rank over warps."""
    best = ptx.constant(-1)
    for j in range(WARPS):
        best = arith.maxsi(best, ptx.load_shared("s32", slot_address(slot, ptx.constant(j)), ptx.int32()))
    is_beyond = arith.cmpi(arith.CmpIPredicate.sge, best, ptx.constant(n))
    return arith.select(is_beyond, arith.subi(ptx.constant(2 * n), best), best)


_PREVIOUS_LANE = (
    "{ .reg .pred p; .reg .f32 t; shfl.sync.up.b32 t|p, $1, 1, 0, 0xffffffff; selp.f32 $0, t, 0f00000000, p; }"
)
"""PTX of $1 in the lane before this one, 0 in the first."""


def _running_sums(values: list[Any]) -> list[Any]:
    sums = values[:1]
    for value in values[1:]:
        sums.append(arith.addf(sums[-1], value))
    return sums


def first_scalar_beyond(weights: list[jax.Array], bound: jax.Array) -> jax.Array:
    """Like `choose`, for a few scalars, and with a bound of the running sum in place of a uniform."""
    best, found, total = jnp.int32(-1), jnp.bool_(False), jnp.float32(0)
    for i, weight in enumerate(weights):
        best = jnp.where((weight > 0) & ~found, i, best)
        total = total + weight
        found = found | ((weight > 0) & (total > bound))
    return best
