"""Parts of kernels that are written in PTX: constants, addresses, elements of registers, operations of a warp.

These functions emit MLIR of one thread, and are called inside `plgpu.inline_mgpu`.
"""

from typing import Any

from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir.dialects import arith, llvm
from jax.experimental.mosaic.gpu import utils as mosaic

from pallas_kernels.config import WARP


def int32() -> Any:
    """The type int32."""
    return ir.IntegerType.get_signless(32)


def constant(value: int) -> Any:
    """An int32 constant."""
    return arith.constant(int32(), ir.IntegerAttr.get(int32(), value))


def inline(code: str, *args: Any, result: Any = None) -> Any:
    """Emits PTX that all threads of a warp run together; returns its result, of type `result`, if it has one."""
    return mosaic.inline_ptx(code, *args, result_types=result, has_side_effects=True, convergent=True)


def address(ref: Any) -> Any:
    """Address of the first element of a ref in shared memory, int32."""
    return llvm.ptrtoint(int32(), mosaic.memref_ptr(ref))


def thread_warp_lane() -> tuple[Any, Any, Any]:
    """Index of the thread in its block, of its warp in the block, and of the thread in its warp."""
    thread = mosaic.thread_idx()
    warp = arith.shrui(thread, constant(WARP.bit_length() - 1))
    return thread, warp, arith.andi(thread, constant(WARP - 1))


def elements(register: Any) -> list[Any]:
    """The elements of a vector of one thread."""
    return [llvm.extractelement(register, constant(i)) for i in range(ir.VectorType(register.type).shape[0])]


def prefix_sum(value: Any, kind: str, result: Any) -> Any:
    """Sum of a value over the lanes of a warp up to this one; `kind` is f32 or u32, and `result` its MLIR type."""
    # Each step adds the sum of the lane 1, 2, 4, 8 or 16 before this one, if there is one.
    steps = "".join(
        f"shfl.sync.up.b32 t|p, $0, {1 << i}, 0, 0xffffffff; @p add.{kind} $0, $0, t; "
        for i in range(WARP.bit_length() - 1)
    )
    return inline(f"{{ .reg .pred p; .reg .{kind} t; mov.{kind} $0, $1; {steps}}}", value, result=result)


def load_shared(kind: str, address: Any, result: Any) -> Any:
    """Loads one value from shared memory; `kind` is f32, u32 or s32, and `result` its MLIR type."""
    return inline(f"ld.shared.{kind} $0, [$1];", address, result=result)


def store_from_lane(number: int, kind: str, lane: Any, address: Any, value: Any):
    """Stores to shared memory the value that lane `number` of each warp holds; `kind` is f32, u32 or s32."""
    store = f"{{ .reg .pred p; setp.eq.u32 p, $0, {number}; @p st.shared.{kind} [$1], $2; }}"
    inline(store, lane, address, value)


def exchange(value: Any, distance: int) -> Any:
    """The float32 of the lane whose number differs in the bit `distance`."""
    return inline(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, 0xffffffff;", value, result=ir.F32Type.get())


def global_address(ref: Any, index: Any) -> Any:
    """Address of an element of 4 bytes in global memory, int64."""
    i64 = ir.IntegerType.get_signless(64)
    start = llvm.ptrtoint(i64, mosaic.memref_ptr(ref))
    return arith.addi(start, arith.extui(i64, arith.muli(index, constant(4))))


def store_if(comparison: str, number: Any, other: int, space: str, address: Any, value: Any):
    """Stores a float32 to shared or global memory in threads whose `number` compares as said with `other`."""
    store = f"{{ .reg .pred p; setp.{comparison}.s32 p, $0, {other}; @p st.{space}.f32 [$1], $2; }}"
    inline(store, number, address, value)
