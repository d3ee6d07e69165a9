"""Shapes and random inputs that the tests and benchmarks of the kernels share."""

import functools

import jax
import jax.numpy as jnp

from specsamp_jax._types import ROUNDS, Draft, Filter, Uniforms
from specsamp_jax.sampling.filters import make_filter

NOISE = 0.5
"""Standard deviation of draft logits minus target logits; the acceptance rate is then 2 Phi(-NOISE / 2) = .80."""

VOCABULARIES = 151936, 32000, 51864, 128256, 256000

LOWERED = [
    (1, 4, 151936, "bfloat16", "logits"),
    (8, 5, 51865, "float16", "normalizers"),
    (64, 4, 50257, "bfloat16", "one_hot"),
    (64, 4, 128256, "float32", "normalizers"),
    (256, 8, 256000, "bfloat16", "logits"),
    (64, 0, 32000, "bfloat16", "one_hot"),
    (3, 2, 1_999_999, "float32", "logits"),
]
"""B, K, V, dtype and the draft's kind of the shapes that the tests lower for CUDA."""

COMPILED = [
    (64, 4, 151936, "bfloat16", "logits"),
    (64, 4, 151936, "bfloat16", "normalizers"),
    (64, 4, 151936, "bfloat16", "logits, filters"),
    (64, 4, 151936, "bfloat16", "logits, greedy filters"),
    (64, 4, 151935, "bfloat16", "normalizers"),
    (64, 4, 128256, "float16", "normalizers"),
    (64, 4, 128256, "float32", "normalizers"),
    (64, 4, 50257, "bfloat16", "normalizers"),
    (64, 4, 51865, "float32", "normalizers"),
    (256, 8, 32000, "bfloat16", "normalizers"),
    (256, 8, 151936, "bfloat16", "normalizers"),
    (1, 4, 256000, "bfloat16", "logits"),
    (1, 4, 151936, "bfloat16", "normalizers"),
]
"""Shapes that `sm90.py` compiles without a GPU; those of B 256 exit early."""

TIMED = [
    (batch_size, num_draft, vocab_size, dtype, kind)
    for dtype in ("bfloat16", "float32")
    for vocab_size in VOCABULARIES
    for num_draft in (4, 8)
    for batch_size in (1, 8, 64, 256)
    for kind in ("normalizers", "logits")
    # The draft's rows are read at one K only.
    if kind == "normalizers" or num_draft == 4
]
"""Shapes that `timings.py` times."""

NAMES = "batch_size", "num_draft", "vocab_size", "dtype", "kind"
"""Static arguments of `random_inputs`: the parts of a shape."""


def random_inputs(
    key, batch_size, num_draft, vocab_size, dtype, kind, *, noise=NOISE, sampling=None, draft_sampling=None
):
    """Arguments of a core: draft logits are target logits plus noise, and draft tokens are sampled from them.

    `kind` is "logits" (no normalizers), "normalizers" (logits and normalizers) or "one_hot" (no logits).
    """
    keys = jax.random.split(key, 6)
    shape = batch_size, num_draft + 1, vocab_size
    target = (3 * jax.random.normal(keys[0], shape)).astype(dtype)
    logits = target[:, :-1] + noise * jax.random.normal(keys[1], (batch_size, num_draft, vocab_size))
    logits = logits.astype(dtype)
    target_filter = make_filter(target, sampling)
    draft_filter = make_filter(logits if num_draft else target[:, :0], draft_sampling)
    draft = sampled_draft(keys[2], logits, filtered_logits(logits, draft_filter))
    uniforms = Uniforms(
        jax.random.uniform(keys[3], (batch_size, num_draft)),
        jax.random.uniform(keys[4], (batch_size, 2)),
        jax.random.uniform(keys[5], (batch_size, 3, ROUNDS)),
    )
    if kind != "normalizers":
        draft = draft._replace(log_normalizers=None)
    if kind == "one_hot":
        draft, draft_filter = Draft(draft.tokens), Filter()
    return target, target_filter, draft, draft_filter, uniforms


def sampled_draft(key, logits, filtered):
    """A draft with these logits, its tokens sampled from `filtered`, whose normalizers it hands over."""
    tokens = jax.random.categorical(key, filtered).astype(jnp.int32)
    return Draft(tokens, logits, None, jax.nn.logsumexp(filtered, axis=-1))


make = functools.partial(jax.jit, static_argnames=NAMES)(random_inputs)
"""`random_inputs`, compiled."""


def filtered_logits(logits, row_filter):
    """The logits after a filter, in float32."""
    x = logits.astype(jnp.float32)
    kept = jnp.ones(x.shape, bool) if row_filter.cutoff is None else x >= row_filter.cutoff[..., None]
    scaled = x if row_filter.scale is None else x * row_filter.scale[:, None, None]
    if row_filter.greedy is not None:
        first = jnp.argmax(x, -1, keepdims=True) == jnp.arange(x.shape[-1])
        kept = jnp.where(row_filter.greedy[:, None, None], first, kept)
    return jnp.where(kept, scaled, -jnp.inf)
