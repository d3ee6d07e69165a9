"""Checks on a GPU that `verify` runs the kernel and equals XLA, and that greedy speculative text is the target's.

PYTHONPATH=. python bench/gpu/dispatch.py
"""

import jax
import jax.numpy as jnp
import numpy as np

import specsamp_jax as ss
from specsamp_jax.cli.pair import load_pair


def main() -> None:
    """Prints each comparison; raises AssertionError if one fails."""
    keys = jax.random.split(jax.random.key(0), 4)
    target = (jax.random.normal(keys[0], (8, 5, 50_257)) * 3).astype(jnp.bfloat16)
    logits = target[:, :4] + jax.random.normal(keys[1], (8, 4, 50_257)).astype(jnp.bfloat16)
    draft = ss.Draft(jax.random.categorical(keys[2], logits.astype(jnp.float32)), logits)
    for rule in (ss.verify, ss.verify_sigmoid):
        program = jax.jit(rule, static_argnames="implementation")
        text = program.lower(keys[3], target, draft).compile().as_text() or ""
        best, xla = (program(keys[3], target, draft, implementation=name) for name in (None, "xla"))
        same = bool((best.tokens == xla.tokens).all())
        print(f"{rule.__name__}: kernel in the program {'mosaic_gpu' in text}, tokens as XLA's {same}")
        assert same
        assert "mosaic_gpu" in text

    pair = load_pair()
    prompt = np.array([pair.encode("Return the smallest")] * 2)
    for temperature in (0.0, 1.0):
        texts = {}
        for name, draft_model in (("speculative", pair.drafter), ("alone", None)):
            options = {"sampling": ss.SamplingParams(temperature), "max_new_tokens": 64, "num_draft": 4}
            result = ss.generate(keys[0], prompt, target=pair.target, draft=draft_model, **options)
            texts[name] = result.tokens
            print(f"temperature {temperature}, {name}: {result.stats.num_steps} steps")
        if temperature == 0:
            assert (texts["speculative"] == texts["alone"]).all(), "greedy speculative text is not the target's"
    print("greedy text is the target's own")


if __name__ == "__main__":
    main()
