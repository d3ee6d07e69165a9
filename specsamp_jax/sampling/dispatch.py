"""The choice between a plain JAX core and its GPU kernel."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.core import Tracer

from specsamp_jax.sampling.mesh_axes import same_axes, vary_like

NEEDED = "an NVIDIA GPU of compute capability 9.0 (Hopper) or newer"

for_this_machine = jax.make_user_context(False)
"""`with for_this_machine(True)`: no program is exported for another machine, so kernels are traced if they can run.

A program of `NGramDrafter` is traced in less than half the time without them.
"""


def _has_kernels() -> bool:
    """Whether this process runs on GPUs that the kernels support."""
    return jax.default_backend() == "gpu" and all(float(d.compute_capability) >= 9 for d in jax.devices())


def _may_compile_kernels(arguments: object) -> bool:
    """Whether the call may be compiled for a GPU that the kernels support.

    A process without a GPU may export a traced program for a machine that has one. A call without tracers runs on
    this machine.
    """
    if for_this_machine.value or jax.default_backend() == "gpu":
        return _has_kernels()
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(arguments))


def dispatch(
    core: Callable[..., Any],
    kernel: Callable[..., Any] | None,
    arguments: tuple,
    why_not_fn: Callable[[], str | None],
    implementation: str | None,
) -> Any:
    """Returns `core(*arguments)` or `kernel(*arguments)`, chosen when the program is lowered.

    Args:
      core: The plain JAX function.
      kernel: The same function as a GPU kernel. None: there is none.
      arguments: The arguments of both.
      why_not_fn: Returns the requirement of the kernel that these arguments do not meet; None if they meet all. Called
        where the kernel may run.
      implementation: "xla", "pallas", or None for the kernel if the program is compiled for a GPU that supports it.

    Raises:
      NotImplementedError: "pallas" is asked for and cannot run here.
    """
    if implementation == "pallas":
        why_not = "a rule that has a kernel; this one has none" if kernel is None else why_not_fn()
        if why_not is None and not _has_kernels():
            why_not = f"{NEEDED}; got {jax.default_backend()}"
        if why_not is not None:
            raise NotImplementedError(f'implementation "pallas" needs {why_not}.')
        assert kernel is not None
        return kernel(*arguments)
    if implementation == "xla" or kernel is None or not _may_compile_kernels(arguments) or why_not_fn() is not None:
        return core(*arguments)
    # The branches inside a kernel combine several inputs, so all inputs must vary over the same manual axes.
    arguments = vary_like(arguments, arguments)
    kernel, core = same_axes(kernel, core, arguments=arguments)
    return lax.platform_dependent(*arguments, cuda=kernel, default=core)
