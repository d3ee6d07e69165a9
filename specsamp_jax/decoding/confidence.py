"""A drafter that stops after a token it is not sure of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Key

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, Draft, Filter, Model, SamplingParams
from specsamp_jax.decoding.drafters import ProcessLogitsFn, draw_next, first_logits
from specsamp_jax.decoding.model_call import apply, prefill
from specsamp_jax.sampling import rows as dist


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConfidenceDrafter:
    """Drafts with a smaller model until it is not sure of a token, which is the last one proposed.

    The draft of a row ends after the first token whose probability is below `threshold`. That token is kept: to
    drop it because of its own probability would change the law of what is emitted; see `Draft`. The model runs
    until every row has ended, `num_draft` times at most.

    Attributes:
      model: The model; its vocabulary is the target's.
      threshold: The least probability, in [0, 1], that goes on drafting: of the drafted token, under the model's
        logits at temperature 1 and without filters, so that it has a meaning for greedy drafts too. A scalar or
        `[B]`. 0 never stops.
      sampling: What is applied to its logits. None: what is applied to the target's.

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
      >>> _, info = ss.step(jax.random.key(0), state, **models, num_draft=4)
      >>> info.num_drafted.tolist()
      [3]
    """

    model: Model
    threshold: ArrayLike = 0.4
    sampling: SamplingParams | None = None

    def check(self, batch_size: int) -> None:
        """Raises ValueError where a parameter is out of its range."""
        _checks.real("draft.threshold", self.threshold, batch_size, 1, "0 never stops")
        if self.sampling is not None:
            _checks.sampling("draft.sampling", self.sampling, batch_size)

    def init(self, tokens: Int[Array, "B W"], max_length: int) -> Any:
        """The model's cache, filled with the prompts."""
        return prefill(self.model, tokens, max_length)

    def propose(
        self,
        key: Key[Array, "B"],
        state: Any,
        tokens: Int[Array, "B W"],
        lengths: Int[Array, "B"],
        *,
        num_draft: int,
        sampling: SamplingParams,
        process_logits_fn: ProcessLogitsFn,
    ) -> tuple[Draft, Any]:
        """Up to `num_draft` tokens a row, the last of them unsure, with the logits they were sampled from."""
        params = sampling if self.sampling is None else self.sampling

        def draw(logits, tokens, index):
            return draw_next(key, index, logits, tokens, lengths, params, process_logits_fn)

        def sure(logits, token) -> Bool[Array, "B"]:
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
            return index + 1, going & sure(row, token), cache, token, tokens, drafts

        drafts = (proposal.tokens, proposal.logits, proposal.log_normalizers)
        carry = (jnp.int32(1), sure(logits, token), cache, token, tokens, drafts)
        *_, (drafted, all_logits, log_normalizers) = carry = lax.while_loop(unfinished, next_draft, carry)
        return Draft(drafted, all_logits, params, log_normalizers), carry[2]
