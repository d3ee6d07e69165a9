"""Registers and instructions of the kernels compiled for sm_90a without a GPU: a table in Markdown.

    python bench/gpu/sm90.py WHEELS > bench/results/sm90.md

WHEELS is a folder with the CUDA plugin and PJRT packages of the JAX at hand and nvidia-cuda-nvdisasm, installed
with `pip install --no-deps --target`; ptxas and gcc are on the PATH. The Mosaic GPU compiler asks the CUDA driver only
for the chip, so the script first compiles a stub driver that answers this question. No kernel is run or timed.
"""

import collections
import ctypes
import functools
import itertools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import results

ABOUT = """JAX {}; compiled for sm_90a without a GPU. One row per kernel: of two launches the first, of three the
second reads all rows, a chunk a block. Instructions an element of a chunk: from its loads without masks to its sum,
the two reductions over the block included, over the elements of a thread. A group: the tiles of what emits that
are read together; instructions from its loads to its weights, over its exponentials, which are one a logit.
"""

DRIVER = r"""
typedef int R;
#define OK(name, ...) R name(__VA_ARGS__) { return 0; }
static int attribute(int a) {
  switch (a) { case 75: return 9; case 76: return 0; case 16: return 132; case 97: return 232448;
               case 8: return 49152; case 10: return 32; default: return 1; }
}
R cuDeviceGetAttribute(int *v, int a, int d) { *v = attribute(a); return 0; }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { *n = 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = i; return 0; }
R cuCtxGetDevice(int *d) { *d = 0; return 0; }
R cuDeviceGetName(char *s, int n, int d) { if (n > 0) s[0] = 0; return 0; }
R cuGetErrorString(R e, const char **s) { *s = "none"; return 0; }
R cuGetErrorName(R e, const char **s) { *s = "none"; return 0; }
#define GIVES(name, ...) R name(void **p, ##__VA_ARGS__) { *p = (void *)1; return 0; }
GIVES(cuCtxGetCurrent) GIVES(cuDevicePrimaryCtxRetain, int d) GIVES(cuModuleLoadData, const void *i)
GIVES(cuModuleLoadDataEx, const void *i, unsigned n, void *o, void *v)
GIVES(cuModuleGetFunction, void *m, const char *s)
GIVES(cuLibraryLoadData, const void *c, void *a, void *b, unsigned n, void *e, void *f, unsigned m)
GIVES(cuLibraryGetKernel, void *l, const char *s)
OK(cuInit, unsigned f) OK(cuCtxSetCurrent, void *c) OK(cuDevicePrimaryCtxRelease_v2, int d)
OK(cuModuleUnload, void *m) OK(cuFuncSetAttribute, void *f, int a, int v)
OK(cuKernelSetAttribute, int a, int v, void *k, int d)
R cuModuleGetGlobal_v2(void **p, unsigned long *n, void *m, const char *s) { *p = (void *)1; return 0; }
"""


def load_compiler(wheels, folder):
    """The entry point of the plugin's Mosaic GPU compiler."""
    source, stub = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    command = ["gcc", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", stub, source]
    subprocess.run(command, check=True)
    runtime = next(wheels.glob("jax_cuda*_plugin/libmosaic_gpu_runtime.so"))
    os.environ |= {"MOSAIC_GPU_RUNTIME_LIB_PATH": str(runtime), "MOSAIC_GPU_DUMP_TO": str(folder)}
    os.environ |= {"MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    os.environ.setdefault("CUDA_ROOT", "/usr/local/cuda")
    ctypes.CDLL(str(stub), ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(next(wheels.glob("jax_plugins/xla_cuda*/xla_cuda_plugin.so"))))
    library.MosaicGpuCompile.argtypes = [ctypes.c_char_p, ctypes.c_int]
    library.MosaicGpuCompile.restype = ctypes.c_void_p
    return library.MosaicGpuCompile


def mosaic_modules(operation, ir):
    """The serialized module of every Mosaic GPU call below an operation."""
    for region in operation.regions:
        for block in region.blocks:
            for op in block.operations:
                if op.operation.name == "stablehlo.custom_call" and "mosaic_gpu" in str(
                    op.attributes["call_target_name"]
                ):
                    name = next(n for n in ("mhlo.backend_config", "backend_config") if n in op.attributes)
                    yield ir.StringAttr(ir.DictAttr(op.attributes[name])["module"]).value_bytes
                yield from mosaic_modules(op.operation, ir)


def instructions(sass):
    """Opcodes in order, and the indices at which basic blocks begin."""
    code, starts = [], [0]
    for line in sass.splitlines():
        if re.match(r"^(\.L_x_\d+):", line):
            starts.append(len(code))
        if op := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            code.append(op[1])
            if op[1].startswith(("BRA", "EXIT")):
                starts.append(len(code))
    return code, starts


def describe(fn, args, elements, compile_fn, folder, disassembler):
    """A row of the table for each kernel of `fn`; `elements` are those of a chunk that a thread reads."""
    import jax
    from jax._src.lib.mlir import ir  # pyright: ignore[reportPrivateImportUsage]

    module: Any = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).compiler_ir()
    for assembly in mosaic_modules(module.operation, ir):
        for old in (*folder.glob("*.ptx"), *folder.glob("*.ptxas")):
            old.unlink()
        terminal, silence = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)
        try:
            if not compile_fn(assembly, len(assembly)):
                raise RuntimeError("the compiler refused the kernel")
        finally:
            os.dup2(terminal, 2)
        log, ptx = next(folder.glob("*.ptxas")).read_text(), next(folder.glob("*.ptx"))
        cubin = folder / "kernel.cubin"
        subprocess.run(["ptxas", "-arch=sm_90a", ptx, "-o", cubin], check=True, capture_output=True)
        sass = subprocess.run([disassembler, "-c", cubin], check=True, capture_output=True, text=True).stdout
        code, starts = instructions(sass)
        # A chunk is read in a stretch with its wide loads, and added up in one with an exponential an element; of
        # those that hold enough, the shortest has no masks.
        stretches = [code[a:b] for a, b in itertools.pairwise([*starts, len(code)])]
        sums = [i for i, ops in enumerate(stretches) if ops.count("MUFU.EX2") >= elements]
        reads = [i for i, ops in enumerate(stretches) if ops.count("LDG.E.128") >= 8]
        spans = []
        for i in sums:
            before = [r for r in reads if r <= i]
            if before:
                spans.append([op for ops in stretches[before[-1] : i + 1] for op in ops])
        body = min(spans, key=len) if spans else []
        # A group of tiles of what emits is read and weighed in one stretch: the first with wide loads, or of elements.
        groups = [ops for ops in stretches if ops.count("MUFU.EX2") >= 16 and _count(ops, "LD.E") >= 2]
        wide = [ops for ops in groups if _count(ops, "LD.E.128") + _count(ops, "LD.E.U16") >= 2]
        group = next(iter([*wide, *groups]), [])
        yield {
            "registers": int(re.findall(r"Used (\d+) registers", log)[0]),
            "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "stack": int(re.findall(r"(\d+) bytes stack", log)[0]),
            "instructions": len(code),
            "loads": _loads(body, "LDG"),
            "per element": f"{len(body) / elements:.2f}" if body else "",
            "group loads": _loads(group, "LD.E"),
            "per weight": f"{len(group) / group.count('MUFU.EX2'):.2f}" if group else "",
        }


def _count(ops, kind):
    return sum(op.startswith(kind) for op in ops)


def _loads(ops, kind):
    counts = collections.Counter(op for op in ops if op.startswith(kind))
    return " ".join(f"{n} {op}" for op, n in counts.items())


def cases():
    """Names, functions, arguments, and elements per thread and step, at real shapes."""
    import jax
    import jax.numpy as jnp
    from kernel_inputs import COMPILED

    from specsamp_jax._types import ROUNDS, Draft, Filter, Uniforms
    from specsamp_jax.rules import kernels

    def arg(*shape, dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    for b, k, v, name, what in COMPILED:
        dtype = jnp.dtype(name)
        filters = [Filter(), Filter()]
        if "filters" in what:
            greedy = arg(b, dtype=bool) if "greedy" in what else None
            filters = [Filter(arg(b), arg(b, rows), greedy) for rows in (k + 1, k)]
        normalizers = arg(b, k) if what == "normalizers" else None
        draft = Draft(arg(b, k, dtype=jnp.int32), arg(b, k, v, dtype=dtype), None, normalizers)
        uniforms = Uniforms(arg(b, k), arg(b, 2), arg(b, 3, ROUNDS))
        args = arg(b, k + 1, v, dtype=dtype), filters[0], draft, filters[1], uniforms
        yield f"token B{b} K{k} V{v} {name} {what}", kernels.verify_token, args, 64 * 2 // dtype.itemsize
        if what == "normalizers" and k == 4:
            yield f"block B{b} K{k} V{v} {name} {what}", kernels.verify_block, args, 64 * 2 // dtype.itemsize
    b, k, v = 64, 4, 151936
    sigmoid = functools.partial(kernels.verify_sigmoid, alpha=-1e4, beta=1e4)
    logits = [arg(b, k + 1, v, dtype=jnp.bfloat16), arg(b, k, v, dtype=jnp.bfloat16)]
    draft, uniforms = Draft(arg(b, k, dtype=jnp.int32), logits[1]), Uniforms(arg(b, k), arg(b, 2))
    yield "sigmoid B64 K4 V151936 bfloat16", sigmoid, (logits[0], Filter(), draft, Filter(), uniforms), 64
    yield from cases_from_keys()


def cases_from_keys():
    """`verify` and `sample` from their keys, with the filters that Qwen2.5 ships and without."""
    import jax
    import jax.numpy as jnp

    from specsamp_jax._types import Draft, SamplingParams
    from specsamp_jax.rules import kernels
    from specsamp_jax.sampling import kernels as sampling_kernels

    k, v, words = 4, 151936, jax.ShapeDtypeStruct((2,), jnp.uint32)
    shipped = SamplingParams(0.7, 20, 0.8)

    def verify(words, target, drafted, tokens, normalizers):
        draft = Draft(tokens, drafted, None, normalizers)
        return kernels.verify_token_from_keys(words, target, shipped, draft, shipped)

    for b in (1, 64):
        rows, drafts = (b, k + 1, v), (b, k, v)
        logits = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (rows, drafts)]
        drafted = jax.ShapeDtypeStruct((b, k), jnp.int32), jax.ShapeDtypeStruct((b, k), jnp.float32)
        name = f"B{b} K{k} V{v} bfloat16"
        yield f"verify from a key {name}, T .7 k 20 p .8", verify, (words, *logits, *drafted), 64
        row = jax.ShapeDtypeStruct((b, v), jnp.bfloat16)
        for what, sampling in (("no filter", None), ("T .7 k 20 p .8", shipped)):
            sample = functools.partial(sampling_kernels.sample, sampling=sampling)
            yield f"sample from a key B{b} V{v} bfloat16, {what}", sample, (words, row), 64


def main():
    wheels = pathlib.Path(sys.argv[1])
    import jax

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        compile_fn = load_compiler(wheels, folder)
        disassembler = next(path for path in wheels.rglob("nvdisasm") if path.is_file())
        disassembler.chmod(0o755)
        print(ABOUT.format(jax.__version__))
        header = ["registers", "spilled", "stack", "instructions", "loads", "per element", "group loads", "per weight"]
        names = ["kernel", *header[:4], "loads of a chunk", "an element", "loads of a group", "a logit"]
        rows = (
            [name, *(row[h] for h in header)]
            for name, fn, args, elements in cases()
            for row in describe(fn, args, elements, compile_fn, folder, disassembler)
        )
        for line in results.table(names, rows, left=range(len(names))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
