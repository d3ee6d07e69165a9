"""Lists the launches of a compiled step from its optimised HLO: the XLA core (before) and the kernel (after).

    python bench/gpu/launches.py > bench/results/gpu_launches.md

Without a GPU it lists only the XLA core, compiled for the CPU, to try out the script.
"""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

import specsamp_jax as ss

SHAPE = B, K, V = 64, 4, 151_936
NOT_LAUNCHED = frozenset(
    ["parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"]
)


def instructions(text: str) -> list[tuple[str, str]]:
    """Opcode and name of every instruction that launches, in order, loops and branches included.

    Instructions inside a fusion or a reduction do not count.
    """
    found, inside = [], False
    called = set(re.findall(r"(?:calls|to_apply|comparator|reduction|scatter)=\{?%?([\w.\-]+)", text))
    for line in text.splitlines():
        if head := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            inside = head[1] not in called
        elif line.startswith("}"):
            inside = False
        elif inside and (match := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(", line)):
            target = re.search(r'custom_call_target="([^"]+)"', line)
            found.append((match[2] if target is None else f"custom-call {target[1]}", match[1]))
    return [(op, name) for op, name in found if op not in NOT_LAUNCHED]


def arg(*shape: int, dtype: Any = jnp.float32) -> Any:
    """An argument by its shape and type."""
    return jax.ShapeDtypeStruct(shape, dtype)


def main() -> None:
    """Prints a list for each implementation."""
    target, logits = arg(B, K + 1, V, dtype=jnp.bfloat16), arg(B, K, V, dtype=jnp.bfloat16)
    draft = ss.Draft(arg(B, K, dtype=jnp.int32), logits, None, arg(B, K))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    device = jax.devices()[0].device_kind
    print(f"# What a step launches: {device}, JAX {jax.__version__}\n")
    print(
        f"B = {B}, K = {K}, V = {V:,}, bfloat16, normalizers handed over; instructions of the optimised HLO, in order."
    )
    print("The keys' uniforms are part of a step and of both lists.")
    for title, name in (("Before: the XLA core", "xla"), ("After: the kernel", None)):
        if name is None and jax.default_backend() != "gpu":
            continue
        step = jax.jit(functools.partial(ss.verify, implementation=name))
        found = instructions(step.lower(keys, target, draft).compile().as_text() or "")
        counts = ", ".join(f"{n} {op}" for op, n in collections.Counter(op for op, _ in found).most_common())
        print(f"\n## {title}\n\n{len(found)} instructions: {counts}.\n")
        for op, instruction in found:
            print(f"- {op} `{instruction}`")


if __name__ == "__main__":
    main()
