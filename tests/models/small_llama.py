import jax
from flax import nnx

from specsamp_jax.models import Llama, LlamaConfig

# Grouped queries, a head that is no share of the hidden size, and no default that could hide a mistake.
SIZES = {
    "vocab_size": 31,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 500.0,
    "rms_norm_eps": 1e-3,
}


def make_llama(seed=0, scale=0.2, dtype="float32", **changes):
    """A Llama with random parameters, those of the norms too, so large that logits are of order 1."""
    module = Llama(LlamaConfig(**{**SIZES, **changes}), dtype=dtype, rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(seed), 100))

    def draw(param):
        centre = 1.0 if param.ndim == 1 else 0.0
        return centre + scale * jax.random.normal(next(keys), param.shape, param.dtype)

    nnx.update(module, jax.tree.map(draw, nnx.state(module)))
    return module
