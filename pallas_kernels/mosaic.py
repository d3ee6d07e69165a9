"""Whether Mosaic GPU, in which the kernels are written, can be imported: some builds of jaxlib lack it.

The import takes .3 s, which a process that needs no kernel saves: callers import the modules of kernels in functions.
"""

import functools


@functools.cache
def why_missing() -> str | None:
    """Returns the requirement of the kernels that this jaxlib does not meet; None if it meets it."""
    try:
        from jax.experimental.mosaic.gpu import utils
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        return f"a jaxlib with Mosaic GPU, which this one lacks ({error})"
    del mosaic_gpu, utils
    return None
