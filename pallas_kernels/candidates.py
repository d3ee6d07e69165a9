"""Stream compaction in PTX: lists the elements of vectors in registers that are at least a bound, in shared memory.

Two passes over the vectors: the first counts the elements of each thread, a prefix sum of the counts gives each thread
its offset in the list, and the second pass writes the elements.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config, ptx
from pallas_kernels import tiles as tiling
from pallas_kernels.config import WARP

COUNT = 4
"""Index in `counts` of the number of elements found; indices 0 to 3 are the counts of the block's four warps."""

RANKS = 8
"""Values per iteration of `kth_largest`, each with a counter of its own."""


def counts_scratch() -> Any:
    """Scratch for `collect`, in shared memory."""
    return plgpu.SMEM((8,), jnp.int32)


def kth_largest(values: Any, k: Any) -> jax.Array:
    """The k-th largest of `[THREADS]` values in shared memory; -inf if k is greater than THREADS."""
    layout = tiling.lane_layout(config.THREADS)
    lane_value = plgpu.load(values, layout=layout)

    # Several counters, because additions to one counter wait for each other.
    def compare(i, ranks):
        first = i * RANKS
        return tuple(rank + (values[first + j] >= lane_value).astype(jnp.int32) for j, rank in enumerate(ranks))

    zero = plgpu.layout_cast(jnp.zeros((config.THREADS,), jnp.int32), layout)
    rank = sum(lax.fori_loop(0, config.THREADS // RANKS, compare, (zero,) * RANKS))
    return jnp.max(jnp.where(rank >= k, lane_value, -jnp.inf))


def collect(
    vectors: list[jax.Array],
    layout: Any,
    bound: Any,
    listed: Any,
    counts: Any,
    listed_numbers: Any = None,
    numbers: list[jax.Array] | None = None,
):
    """Writes the elements that are at least `bound[0]` to `listed`, in a deterministic order.

    Args:
      vectors: Vectors in registers, all of one dtype.
      layout: Layout of each vector.
      bound: Shared memory, float32 `[1]`. Must be exact in the dtype of the vectors.
      listed: Shared memory, float32 `[capacity]`. Elements beyond its capacity are dropped.
      counts: Shared memory from `counts_scratch`. `counts[COUNT]` is set to the number of elements that are at least
        the bound, dropped ones included.
      listed_numbers: Shared memory, int32 `[capacity]`: receives the number of each element of `listed`. None: numbers
        are not listed.
      numbers: int32 vectors: the number of each element of `vectors`, which then have one element per thread. None: an
        element's number is its index in the concatenation of the vectors.
    """
    # Inline PTX takes no None, so absent arguments are empty tuples.
    more_refs = () if listed_numbers is None else (listed_numbers,)
    more_arrays = () if numbers is None else tuple(numbers)

    @plgpu.inline_mgpu(
        arg_types=(
            (layout,) * len(vectors),
            (layout,) * len(more_arrays),
            (plgpu.RefType(),) * len(more_refs),
            *(plgpu.RefType(),) * 3,
        )
    )
    def emit(context, *refs):
        del context
        arrays, number_arrays, number_refs, bound, listed, counts = refs
        # Elements are converted to float32 inside the inline PTX: outside it, the compiler would keep all converted
        # elements in registers.
        capacity = ir.MemRefType(listed.type).shape[0]
        listed, counts, i32 = ptx.address(listed), ptx.address(counts), ptx.int32()
        bound_value = ptx.load_shared("f32", ptx.address(bound), ir.F32Type.get())
        vectors = [_words(register) for array in arrays for register in array.registers.flat]
        vector_type = ir.VectorType(arrays[0].registers.flat[0].type)
        size_and_dtype = vector_type.shape[0], vector_type.element_type
        vector_counts = [ptx.inline(_count(*size_and_dtype), bound_value, *words, result=i32) for words in vectors]
        thread_count = functools.reduce(arith.addi, vector_counts)
        inclusive = ptx.prefix_sum(thread_count, "u32", i32)
        thread, warp, lane = ptx.thread_warp_lane()
        # The last lane has the sum of its warp.
        ptx.store_from_lane(WARP - 1, "u32", lane, arith.addi(counts, arith.muli(warp, ptx.constant(4))), inclusive)
        mosaic.warpgroup_barrier()
        warp_counts = [ptx.load_shared("u32", arith.addi(counts, ptx.constant(4 * i)), i32) for i in range(4)]
        offset, total = arith.subi(inclusive, thread_count), ptx.constant(0)
        for i, warp_count in enumerate(warp_counts):
            lower = arith.cmpi(arith.CmpIPredicate.ult, ptx.constant(i), warp)
            offset = arith.addi(offset, arith.select(lower, warp_count, ptx.constant(0)))
            total = arith.addi(total, warp_count)
        # All threads store the same value.
        ptx.inline("st.shared.u32 [$0], $1;", arith.addi(counts, ptx.constant(4 * COUNT)), total)
        next_address, end_address = (
            arith.addi(listed, arith.muli(offset, ptx.constant(4))),
            arith.addi(listed, ptx.constant(4 * capacity)),
        )
        per_thread, _ = size_and_dtype
        # Distance from an element's address in `listed` to that of its number.
        distance = [arith.subi(ptx.address(ref), listed) for ref in number_refs]
        first_numbers = [ptx.elements(register)[0] for array in number_arrays for register in array.registers.flat]
        own = arith.muli(thread, ptx.constant(per_thread))
        for i, (number, words) in enumerate(zip(vector_counts, vectors, strict=True)):
            # The start is part of the code: the compiler would keep the sums of all vectors in registers.
            start = 0 if first_numbers else i * config.THREADS * per_thread
            first = [] if not number_refs else [first_numbers[i]] if first_numbers else [own]
            code = _write(*size_and_dtype, start if first else None)
            next_address = ptx.inline(
                code, next_address, end_address, bound_value, number, *words, *distance, *first, result=i32
            )
        mosaic.warpgroup_barrier()

    emit(tuple(vectors), more_arrays, more_refs, bound, listed, counts)


def _words(register: Any) -> list[Any]:
    """The 32-bit words of one thread's vector. A single 16-bit element gives one word with a zero upper half."""
    vector = ir.VectorType(register.type)
    bits = vector.shape[0] * mosaic.bitwidth(vector.element_type)
    if bits < 32:
        narrow_type = ir.IntegerType.get_signless(bits)
        return [arith.extui(ptx.int32(), llvm.bitcast(narrow_type, register))]
    return ptx.elements(llvm.bitcast(ir.VectorType.get((bits // 32,), ptx.int32()), register))


def _element(i: int, dtype: Any, first_word: int) -> str:
    """PTX that converts element `i` of the words from operand `first_word` on to float32, in the register `x`."""
    if dtype == ir.F32Type.get():
        return f"mov.b32 x, ${first_word + i}; "
    word, half = f"${first_word + i // 2}", i % 2
    if dtype == ir.BF16Type.get():
        # A bfloat16 is the upper half of a float32.
        return (f"and.b32 w, {word}, 0xffff0000; " if half else f"shl.b32 w, {word}, 16; ") + "mov.b32 x, w; "
    return f"mov.b32 {{low, high}}, {word}; cvt.f32.f16 x, {('low', 'high')[half]}; "


REGISTERS = ".reg .pred p, q; .reg .f32 x, y; .reg .b32 w, n, m, both; .reg .b16 low, high; "
"""PTX declarations of the registers that `_element`, `_count` and `_write` use."""


def _count(size: int, dtype: Any) -> str:
    """PTX that counts in $0 the elements, in the words from $2 on, that are at least $1. $1 is exact in their dtype."""
    start = "{ " + REGISTERS + "mov.u32 n, 0; "
    if size == 1 or dtype == ir.F32Type.get():
        count_one = "setp.ge.f32 p, x, $1; @p add.u32 n, n, 1; "
        return start + "".join(_element(i, dtype, 2) + count_one for i in range(size)) + "mov.u32 $0, n; }"
    # Compares and counts two packed elements per instruction; counts of at most 8 are exact in 16 bits. Nothing here
    # is also computed by `_write`: the assembler would keep common subexpressions of both passes in registers.
    name = "bf16" if dtype == ir.BF16Type.get() else "f16"
    count_two = f"set.ge.{name}x2.{name}x2 w, ${{}}, both; add.rn.{name}x2 n, n, w; "
    bound = f"cvt.rn.{name}.f32 low, $1; mov.b32 both, {{low, low}}; "
    counts = "".join(count_two.format(2 + i) for i in range(size // 2))
    if name == "bf16":
        to_float32 = "shl.b32 w, n, 16; mov.b32 x, w; and.b32 n, n, 0xffff0000; mov.b32 y, n; "
    else:
        to_float32 = "mov.b32 {low, high}, n; cvt.f32.f16 x, low; cvt.f32.f16 y, high; "
    return start + bound + counts + to_float32 + "add.f32 x, x, y; cvt.rzi.u32.f32 $0, x; }"


def _write(size: int, dtype: Any, start: int | None) -> str:
    """PTX that stores the elements, in the words from $5 on, that are at least $3, from address $1 on.

    $0 is the address after the last element. Nothing is stored at address $2 or above. $4 is the number of elements to
    store, from `_count`: if it is 0 in all threads of a warp, the warp skips the conversions and stores. With a
    start, the last but one operand is the distance from an element's address to that of its number, and the number of
    element i is the last operand plus `start` plus i.
    """
    words = size if dtype == ir.F32Type.get() else -(-size // 2)
    store_number = f"@q add.u32 w, n, ${5 + words}; @q add.u32 m, ${6 + words}, {{}}; @q st.shared.u32 [w], m; "
    store_one = "setp.ge.f32 p, x, $3; setp.lt.and.u32 q, n, $2, p; @q st.shared.f32 [n], x; "
    store_one += ("" if start is None else store_number) + "@p add.u32 n, n, 4; "
    any_in_warp = "mov.u32 n, $1; setp.ne.u32 p, $4, 0; vote.sync.any.pred q, p, 0xffffffff; @!q bra DONE; "
    elements = "".join(_element(i, dtype, 5) + store_one.format((start or 0) + i) for i in range(size))
    return "{ " + REGISTERS + any_in_warp + elements + "DONE: mov.u32 $0, n; }"
