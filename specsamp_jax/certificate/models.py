"""The certificate of a target and a drafter: the first token of many speculative steps after one prompt."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from specsamp_jax._types import Model, SamplingParams
from specsamp_jax.certificate import law
from specsamp_jax.certificate.report import FALSE_ALARM, Certificate, Check, check_law, normal_p_value
from specsamp_jax.decoding.drafters import ModelDrafter
from specsamp_jax.decoding.step import init, step
from specsamp_jax.rules.verify import verify

BATCH = 256
"""Rows of a step."""


def certify_models(
    target: Model,
    draft: Model,
    prompt: Sequence[int],
    *,
    verify_fn: Callable[..., Any] = verify,
    num_draft: int = 2,
    sampling: SamplingParams = SamplingParams(),
    num_batches: int = 32,
    seed: int = 0,
) -> Certificate:
    """Returns a certificate of a decoding step of two models: caches, drafts, verification and all.

    The exact probabilities are a softmax in float64 of the target's logits after the prompt, computed by a call of the
    model alone. The first tokens of many steps are held against them by chi-square, and the acceptance of the first
    draft against sum min(p, q), which no exact rule exceeds.

    Args:
      target: The target.
      draft: The drafter.
      prompt: Token ids, at least one.
      verify_fn: The rule.
      num_draft: Drafts per step, at least 1.
      sampling: Numbers, for target and drafter alike.
      num_batches: Steps of 256 rows that are drawn.
      seed: Of the draws.

    Raises:
      ValueError: As in `step`.

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> target, draft = (ss.Model(jnp.eye(4) * x, bigrams, lambda batch_size, max_length: ()) for x in (2.0, 1.0))
      >>> certify_models(target, draft, [1, 2], num_batches=4).passed
      True
    """
    rows = jnp.broadcast_to(jnp.asarray(prompt), (BATCH, len(prompt)))

    @jax.jit
    def steps(keys, target, draft):
        models = {"target": target, "draft": ModelDrafter(draft), "num_draft": num_draft}
        state = init(rows, **models, max_new_tokens=num_draft + 1)

        def one_batch(key):
            _, info = step(key, state, **models, sampling=sampling, verify_fn=verify_fn)
            return info.tokens[:, 0], info.num_accepted > 0

        return lax.map(one_batch, keys)

    @jax.jit
    def last_logits(model):
        positions = jnp.arange(len(prompt))[None]
        return model.apply_fn(model.params, rows[:1], positions, model.init_cache_fn(1, len(prompt)))[0][0, -1]

    keys = jax.random.split(jax.random.key(seed), num_batches)
    tokens, accepted = (np.ravel(result) for result in steps(keys, target, draft))
    filters = law_filters(sampling)
    p, q = (law.probs(np.asarray(last_logits(model), np.float64), **filters) for model in (target, draft))
    most, share = float(np.minimum(p, q).sum()), float(accepted.mean())
    spread = max(np.sqrt(most * (1 - most) / len(accepted)), 1e-9)
    p_value = normal_p_value((share - most) / spread)
    detail = f"{share:.4f} of the first drafts accepted, sum min(p, q) is {most:.4f}"
    return Certificate(
        (
            check_law("first token", np.bincount(tokens, minlength=len(p)), p),
            Check("acceptance", p_value > FALSE_ALARM, detail, len(accepted), p_value=p_value),
        )
    )


def law_filters(sampling: SamplingParams) -> dict[str, Any]:
    """The parameters as Python numbers."""
    values: dict[str, Any] = sampling._asdict()
    return {name: (int if name == "top_k" else float)(value) for name, value in values.items()}
