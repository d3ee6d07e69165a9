"""A drafter that ends a draft after the first token of low probability."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, Draft, Filter, Model, SamplingParams
from specsamp_jax.decoding.drafters import SampleFn, SamplingDrafter, draw_next, first_logits
from specsamp_jax.decoding.model_call import apply
from specsamp_jax.sampling import rows as dist


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfidenceDrafter(SamplingDrafter):
    """Drafts with a smaller model up to and including the first token of low probability.

    The draft of a row ends after the first token whose probability is below `threshold`. That token is kept:
    dropping it because of its own probability would change the distribution of the emitted tokens; see `Draft`. The
    model runs until the drafts of all rows have ended, at most `num_draft` times.

    Attributes:
      model: The model; its vocabulary is the target's.
      threshold: In [0, 1], a scalar or `[B]`: the draft ends after a token of lower probability. Probabilities are
        those of the model at temperature 1 without filters, so that greedy drafts have them too. 0 never stops.
      sampling: Temperature and filters for the model's logits. None: those of the target.

    Source: Mamou et al. (2024, arXiv 2405.04304), with a threshold in place of a classifier; Hugging Face
    transformers has it as `assistant_confidence_threshold`.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> table = jnp.where(jnp.eye(5, k=1), 9.0, -9.0).at[3].set(0.0)  # sure of each token but the one after 3
      >>> model = ss.Model(table, bigrams, lambda batch_size, max_length: ())
      >>> models = {"target": model, "draft": ss.ConfidenceDrafter(model, 0.5)}
      >>> state = ss.init(jnp.array([[1]]), **models, num_draft=4, max_new_tokens=8)
      >>> step = jax.jit(lambda key, state: ss.step(key, state, **models, num_draft=4))
      >>> _, info = step(jax.random.key(0), state)
      >>> info.num_drafted.tolist()
      [3]
    """

    model: Model
    threshold: ArrayLike = 0.4
    sampling: SamplingParams | None = None

    def check(self, batch_size: int) -> None:
        """Raises ValueError if a parameter is out of its range."""
        _checks.real("draft.threshold", self.threshold, batch_size, 1, "0 never stops")
        super().check(batch_size)

    def _propose(
        self, sample_fn: SampleFn, key, state, tokens, lengths, *, num_draft, sampling, process_logits_fn
    ) -> tuple[Draft, Any]:
        params = sampling if self.sampling is None else self.sampling

        def draw(logits, tokens, index):
            return draw_next(sample_fn, key, index, logits, tokens, lengths, params, process_logits_fn)

        def is_confident(logits, token) -> Bool[Array, "B"]:
            row = dist.target_rows(logits[:, None], Filter())
            return dist.log_prob(row, token[:, None])[:, 0] >= jnp.log(jnp.asarray(self.threshold, jnp.float32))

        logits, cache = first_logits(self.model, state, tokens, lengths)
        token, logits, log_normalizer, tokens = draw(logits, tokens, 0)
        proposal = Draft(
            jnp.full((*lengths.shape, num_draft), PAD_TOKEN, jnp.int32).at[:, 0].set(token),
            jnp.zeros((*lengths.shape, num_draft, logits.shape[-1]), logits.dtype).at[:, 0].set(logits),
            params,
            jnp.zeros((*lengths.shape, num_draft), log_normalizer.dtype).at[:, 0].set(log_normalizer),
        )

        def unfinished(carry):
            index, going, *_ = carry
            return (index < num_draft) & going.any()

        def next_draft(carry):
            index, going, cache, token, tokens, (drafted, logits, log_normalizers) = carry
            row, cache = apply(self.model, token[:, None], lengths[:, None] + index - 1, cache)
            token, row, log_normalizer, tokens = draw(row[:, 0], tokens, index)
            drafts = (
                drafted.at[:, index].set(jnp.where(going, token, PAD_TOKEN)),
                logits.at[:, index].set(row),
                log_normalizers.at[:, index].set(log_normalizer),
            )
            return index + 1, going & is_confident(row, token), cache, token, tokens, drafts

        drafts = (proposal.tokens, proposal.logits, proposal.log_normalizers)
        carry = (jnp.int32(1), is_confident(logits, token), cache, token, tokens, drafts)
        *_, (drafted, all_logits, log_normalizers) = carry = lax.while_loop(unfinished, next_draft, carry)
        return Draft(drafted, all_logits, params, log_normalizers), carry[2]
