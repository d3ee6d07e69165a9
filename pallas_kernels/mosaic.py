"""Whether Mosaic GPU, in which the kernels are written, can be imported: some builds of jaxlib lack it."""


def _why_missing() -> str | None:
    try:
        from jax.experimental.mosaic.gpu import utils
        from jax.experimental.pallas import mosaic_gpu
    except ImportError as error:
        return f"a jaxlib with Mosaic GPU, which this one lacks ({error})"
    del mosaic_gpu, utils
    return None


WHY_MISSING = _why_missing()
"""The requirement of the kernels that this jaxlib does not meet; None if it meets it."""
