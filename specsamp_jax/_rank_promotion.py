"""Broadcasting inside the library, whatever the caller's setting `jax_numpy_rank_promotion` is."""

import functools
from collections.abc import Callable

import jax


def allow_rank_promotion[**P, R](fn: Callable[P, R]) -> Callable[P, R]:
    """Wraps a public function, so that it runs where JAX is set to raise or warn when arrays of two ranks broadcast.

    The setting is for the caller's own code. Functions that the caller passes in, such as `apply_fn`, run as the
    library's do. With JAX's default setting nothing is changed, so that no trace of the caller is made twice.
    """

    @functools.wraps(fn)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if jax.config.jax_numpy_rank_promotion == "allow":
            return fn(*args, **kwargs)
        with jax.numpy_rank_promotion("allow"):
            return fn(*args, **kwargs)

    return run
