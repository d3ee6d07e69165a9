"""The elements of some vectors that reach a bound, as a list in shared memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils as mosaic
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import config
from pallas_kernels import tiles as tiling

COUNT = 4
"""Index of the length of a list among `counts`; those before it are of the block's warps."""


def counts_scratch() -> Any:
    """Scratch for `collect`, in shared memory."""
    return plgpu.SMEM((8,), jnp.int32)


def kth_largest(shared: Any, count: Any) -> jax.Array:
    """The `count`-th largest of [THREADS] numbers in shared memory; -inf where count is larger than that."""
    layout = tiling.lane_layout(config.THREADS)
    own = plgpu.load(shared, layout=layout)

    def compare(i, reached):
        return reached + (shared[i] >= own).astype(jnp.int32)

    zero = plgpu.layout_cast(jnp.zeros((config.THREADS,), jnp.int32), layout)
    reached = lax.fori_loop(0, config.THREADS, compare, zero)
    return jnp.max(jnp.where(reached >= count, own, -jnp.inf))


def collect(vectors: list[jax.Array], layout: Any, bound: Any, listed: Any, counts: Any):
    """Writes the elements of at least `bound[0]` to `listed`, in an order that depends on the vectors alone.

    `counts[COUNT]` becomes their number; those for which `listed` is too short are left out of it.
    """

    @plgpu.inline_mgpu(arg_types=((layout,) * len(vectors), *(plgpu.RefType(),) * 3))
    def emit(context, *refs):
        del context
        arrays, bound, listed, counts = refs
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()

        def c(value):
            return arith.constant(i32, ir.IntegerAttr.get(i32, value))

        def ptx(code, *args, of=None):
            return mosaic.inline_ptx(code, *args, result_types=of, has_side_effects=True, convergent=True)

        def address(ref):
            return llvm.ptrtoint(i32, mosaic.memref_ptr(ref))

        # Conversions are inside the assembly: the compiler would keep those of all elements in registers.
        capacity = ir.MemRefType(listed.type).shape[0]
        listed, counts = address(listed), address(counts)
        least = ptx("ld.shared.f32 $0, [$1];", address(bound), of=f32)
        vectors = [_words(register) for array in arrays for register in array.registers.flat]
        each = ir.VectorType(arrays[0].registers.flat[0].type)
        elements = each.shape[0], each.element_type
        found = [ptx(_count(*elements), least, *words, of=i32) for words in vectors]
        own = functools.reduce(arith.addi, found)
        # Inclusive sum over the lanes of a warp, whose last lane writes the warp's down.
        steps = "".join(f"shfl.sync.up.b32 t|p, $0, {1 << i}, 0, 0xffffffff; @p add.u32 $0, $0, t; " for i in range(5))
        upto = ptx("{ .reg .pred p; .reg .u32 t; mov.u32 $0, $1; " + steps + "}", own, of=i32)
        thread = mosaic.thread_idx()
        warp, lane = arith.shrui(thread, c(5)), arith.andi(thread, c(31))
        at_warp = arith.addi(counts, arith.muli(warp, c(4)))
        ptx("{ .reg .pred p; setp.eq.u32 p, $0, 31; @p st.shared.u32 [$1], $2; }", lane, at_warp, upto)
        mosaic.warpgroup_barrier()
        of_warps = [ptx("ld.shared.u32 $0, [$1];", arith.addi(counts, c(4 * i)), of=i32) for i in range(4)]
        before, total = arith.subi(upto, own), c(0)
        for i, one in enumerate(of_warps):
            lower = arith.cmpi(arith.CmpIPredicate.ult, c(i), warp)
            before = arith.addi(before, arith.select(lower, one, c(0)))
            total = arith.addi(total, one)
        # All threads write the same number.
        ptx("st.shared.u32 [$0], $1;", arith.addi(counts, c(4 * COUNT)), total)
        at, end = arith.addi(listed, arith.muli(before, c(4))), arith.addi(listed, c(4 * capacity))
        for number, words in zip(found, vectors, strict=True):
            at = ptx(_write(*elements), at, end, least, number, *words, of=i32)
        mosaic.warpgroup_barrier()

    emit(tuple(vectors), bound, listed, counts)


def _words(register: Any) -> list[Any]:
    """The 32-bit words of a vector of a thread; of a single narrow element, one word whose upper half is unused."""
    i32 = ir.IntegerType.get_signless(32)
    vector = ir.VectorType(register.type)
    bits = vector.shape[0] * mosaic.bitwidth(vector.element_type)
    if bits < 32:
        single = ir.IntegerType.get_signless(bits)
        return [arith.extui(i32, llvm.bitcast(single, register))]
    whole = llvm.bitcast(ir.VectorType.get((bits // 32,), i32), register)
    return [llvm.extractelement(whole, arith.constant(i32, ir.IntegerAttr.get(i32, i))) for i in range(bits // 32)]


def _element(i: int, dtype: Any, first_word: int) -> str:
    """PTX that puts element `i` of the words from operand `first_word` on into the register `x`, as float32."""
    if dtype == ir.F32Type.get():
        return f"mov.b32 x, ${first_word + i}; "
    word, half = f"${first_word + i // 2}", i % 2
    if dtype == ir.BF16Type.get():
        # A bfloat16 is the upper half of a float32.
        return (f"and.b32 w, {word}, 0xffff0000; " if half else f"shl.b32 w, {word}, 16; ") + "mov.b32 x, w; "
    return f"mov.b32 {{low, high}}, {word}; cvt.f32.f16 x, {('low', 'high')[half]}; "


REGISTERS = ".reg .pred p, q; .reg .f32 x, y; .reg .b32 w, n, both; .reg .b16 low, high; "


def _count(size: int, dtype: Any) -> str:
    """PTX: $0, how many elements of the words from $2 on reach $1, which is a number of their type."""
    start = "{ " + REGISTERS + "mov.u32 n, 0; "
    if size == 1 or dtype == ir.F32Type.get():
        one = "setp.ge.f32 p, x, $1; @p add.u32 n, n, 1; "
        return start + "".join(_element(i, dtype, 2) + one for i in range(size)) + "mov.u32 $0, n; }"
    # Two elements at once; counts of at most 8 are exact. In other ways than `_write` converts them: what both passes
    # need, the assembler would keep in registers.
    name = "bf16" if dtype == ir.BF16Type.get() else "f16"
    two = f"set.ge.{name}x2.{name}x2 w, ${{}}, both; add.rn.{name}x2 n, n, w; "
    bound = f"cvt.rn.{name}.f32 low, $1; mov.b32 both, {{low, low}}; "
    counted = "".join(two.format(2 + i) for i in range(size // 2))
    if name == "bf16":
        ends = "shl.b32 w, n, 16; mov.b32 x, w; and.b32 n, n, 0xffff0000; mov.b32 y, n; "
    else:
        ends = "mov.b32 {low, high}, n; cvt.f32.f16 x, low; cvt.f32.f16 y, high; "
    return start + bound + counted + ends + "add.f32 x, x, y; cvt.rzi.u32.f32 $0, x; }"


def _write(size: int, dtype: Any) -> str:
    """PTX: stores elements of the words from $5 on that reach $3 at the address $1, below $2; $0 is the next address.

    $4 of them do; where none does in any thread of the warp, nothing is to be done.
    """
    one = "setp.ge.f32 p, x, $3; setp.lt.and.u32 q, n, $2, p; @q st.shared.f32 [n], x; @p add.u32 n, n, 4; "
    any_in_warp = "mov.u32 n, $1; setp.ne.u32 p, $4, 0; vote.sync.any.pred q, p, 0xffffffff; @!q bra DONE; "
    elements = "".join(_element(i, dtype, 5) + one for i in range(size))
    return "{ " + REGISTERS + any_in_warp + elements + "DONE: mov.u32 $0, n; }"
