"""Sampling parameters, boundary uniforms and compiled functions, shared by the tests of sampling and of the rules."""

import functools

import jax
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.sampling import draw
from specsamp_jax.sampling.filters import make_filter

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
"""Sampling parameters that switch all filters off."""

BELOW_ONE = 1 - 2.0**-24
"""The largest uniform that a draw can return."""

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options for short programs whose results do not depend on the level of optimisation."""

quick_jit = functools.partial(jax.jit, compiler_options=QUICK)


def as_arrays(settings):
    """Sampling parameters with one value per setting, or with scalars where there is one setting."""
    many = settings if isinstance(settings, list) else [settings]
    columns = ([s[name] for s in many] for name in ss.SamplingParams._fields)
    params = ss.SamplingParams(*(np.array(c, t) for c, t in zip(columns, "fiff", strict=True)))
    return params if isinstance(settings, list) else jax.tree.map(lambda value: value[0], params)


def in_tiles(size, fn):
    """`fn`, compiled with tiles of `size` tokens, so that a small vocabulary has several."""

    def traced(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(draw, "TILE", size)
            return fn(*args)

    return jax.jit(traced)


def with_uniforms(core, size, **constants):
    """A rule's core, compiled with tiles of `size`, with sampling parameters in place of filters."""

    def rule(target_logits, sampling, draft, uniforms):
        draft_logits = target_logits[:, :0] if draft.logits is None else draft.logits
        filters = make_filter(target_logits, sampling), make_filter(draft_logits, draft.sampling)
        return core(target_logits, filters[0], draft, filters[1], uniforms, **constants)

    return in_tiles(size, rule)
