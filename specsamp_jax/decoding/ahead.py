"""Compilation of a generation before its weights are loaded, from their shapes.

While XLA compiles a program, or reads a compiled one, it needs more memory than it keeps. Before the weights are there,
this does not add to the peak of the process.
"""

import inspect
from typing import Any

import jax
import numpy as np
from jax.extend.mlir.passmanager import PassManager
from jaxtyping import Array, Int

from specsamp_jax import _resident
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax.decoding import generate as loop
from specsamp_jax.decoding.num_draft import compiled_lengths
from specsamp_jax.decoding.stats import Counts


@allow_rank_promotion
def compile_generate(prompt: Int[Array | np.ndarray, "B P"], **arguments: Any) -> None:
    """Compiles the program of `generate(key, prompt, **arguments)`, which later calls of these shapes use.

    Args:
      prompt: As in `generate`.
      **arguments: As in `generate`; models may have `jax.ShapeDtypeStruct` in place of arrays.

    Raises:
      ValueError: As in `generate`.
    """
    options, keys, measured, data, statics = _prepare(prompt, arguments)
    prompts, sizes = (prompt, options["prompt_lengths"], measured), {"max_new_tokens": options["max_new_tokens"]}
    _compile(loop._generate.lower(loop.ALL_STEPS, keys, *prompts, *data, **sizes, **statics))


@allow_rank_promotion
def compile_stream(prompt: Int[Array | np.ndarray, "B P"], **arguments: Any) -> None:
    """Compiles the programs of `stream(key, prompt, **arguments)`; otherwise like `compile_generate`."""
    options, keys, measured, data, statics = _prepare(prompt, arguments)
    inputs = prompt, options["prompt_lengths"], measured, *data[:2]
    shared = {name: statics[name] for name in ("num_draft", "verify_fn")}
    lowered = loop._init.lower(*inputs, max_new_tokens=options["max_new_tokens"], **shared)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    _compile(lowered)
    counts = Counts.zeros(prompt.shape[0], compiled_lengths(statics["num_draft"])[-1])
    length = prompt.shape[1] + options["max_new_tokens"]
    loop._text.lower(state, counts, length=length).compile()
    _compile(loop._advance.lower(keys, state, counts, *data, **statics))


def _prepare(prompt: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    parameters = inspect.signature(loop.generate).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    options = defaults | arguments
    keys, *others = loop._prepare(jax.random.key(0), prompt, **options)
    loop._row_keys(keys, prompt.shape[0])  # the small program of calls with a key per row
    return options, keys, *others


def _compile(lowered: jax.stages.Lowered) -> None:
    """Compiles a program, which JAX keeps, and returns memory that the compiler no longer needs to the system."""
    if jax.default_backend() == "cpu":
        _remove_locations(lowered)
    lowered.compile()
    _resident.release()


def _remove_locations(lowered: jax.stages.Lowered) -> None:
    """Removes source locations, of which XLA's CPU backend keeps a copy or two per operation: 8 % of a program.

    They are not part of the key in JAX's cache of compiled programs.
    """
    module: Any = lowered.compiler_ir("stablehlo")
    with module.context:
        PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
