import contextlib

import kernel_cases as cases
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@pytest.fixture
def interpreted():
    """Runs kernels: compiled where there is a GPU, else interpreted on the CPU."""
    if cases.ON_GPU:
        return contextlib.nullcontext
    # The fence between blocks has no meaning to the interpreter, which orders them by their barriers.
    params = plgpu.InterpretGPUParams(inline_mgpu="ignore")
    return lambda: plgpu.force_gpu_interpret_mode(params)
