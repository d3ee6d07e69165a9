"""A decoder from another library as a `Model`: penzai's transformer, with penzai's own key-value cache.

    pip install penzai
    python examples/penzai_model.py

Any model runs through `Model` once two functions exist for it: one that makes an empty cache, and one that scores
tokens at given positions. Here both call penzai.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from penzai import pz
from penzai.models.transformer.sampling_mode import KVCachingTransformerLM
from penzai.models.transformer.variants import llamalike_common

import specsamp_jax as ss


def from_penzai(transformer: Any) -> ss.Model:
    """Returns a penzai transformer as a `Model`."""
    weightless, params = pz.unbind_params(transformer, freeze=True)

    def caching(params, max_length):
        """The transformer split in two: what has no state, and the variables of an empty cache."""
        bound = pz.bind_variables(weightless, params, unfreeze_as_copy=True)
        return pz.unbind_state_vars(KVCachingTransformerLM.from_uncached(bound, max_length, {}, pad_id=-1), freeze=True)

    def init_cache_fn(batch_size, max_length):
        return jax.tree.map(lambda x: jnp.stack([x] * batch_size), caching(params, max_length)[1])

    # Row by row: penzai's cache has one write position for a whole batch, and here each row has its own length.
    def apply_row(params, tokens, positions, cache):
        max_length = max(x.shape[0] for x in jax.tree.leaves(cache) if x.ndim == 1)
        model = pz.bind_variables(caching(params, max_length)[0], cache, unfreeze_as_copy=True)
        model.cache_end_index.value = positions[0]
        logits = model(pz.nx.wrap(tokens, "seq")).unwrap("seq", "vocabulary")
        return logits, pz.unbind_state_vars(model, freeze=True)[1]

    return ss.Model(params, jax.vmap(apply_row, (None, 0, 0, 0)), init_cache_fn)


def small_transformer() -> Any:
    """Returns a random Llama of penzai's with one layer and 11 tokens."""
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=16,
        projection_dim=8,
        mlp_hidden_dim=24,
        num_decoder_blocks=1,
        vocab_size=11,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
    )
    return llamalike_common.build_llamalike_transformer(config, init_base_rng=jax.random.key(0))


PROMPTS = np.array([[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]])
PROMPT_LENGTHS = np.array([5, 2])


def main(transformer: Any) -> ss.Generation:
    """Continues two prompts of different lengths greedily, drafting with n-grams."""
    return ss.generate(
        jax.random.key(0),
        PROMPTS,
        prompt_lengths=PROMPT_LENGTHS,
        target=from_penzai(transformer),
        draft=ss.NGramDrafter(),
        max_new_tokens=20,
        sampling=ss.SamplingParams(temperature=0.0),
    )


if __name__ == "__main__":
    text = main(small_transformer())
    print(text.tokens)
    print(f"{text.stats.num_emitted.tolist()} tokens in {text.stats.num_steps} steps")
