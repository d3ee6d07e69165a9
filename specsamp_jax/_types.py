"""The named tuples that pass between modules; those the kernels use too come from `pallas_kernels.types`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt32

from pallas_kernels.types import DEGENERATE_DRAFT as DEGENERATE_DRAFT
from pallas_kernels.types import DEGENERATE_TARGET as DEGENERATE_TARGET
from pallas_kernels.types import EMIT_DRAWS as EMIT_DRAWS
from pallas_kernels.types import EMPTY_RESIDUAL as EMPTY_RESIDUAL
from pallas_kernels.types import LARGEST_LOG_NORMALIZER as LARGEST_LOG_NORMALIZER
from pallas_kernels.types import PAD_TOKEN as PAD_TOKEN
from pallas_kernels.types import ROUNDS as ROUNDS
from pallas_kernels.types import TILE as TILE
from pallas_kernels.types import Filter as Filter
from pallas_kernels.types import Uniforms as Uniforms
from pallas_kernels.types import Verification as Verification

KeyLike = Key[Array, "*keys"] | UInt32[Array | np.ndarray, "*keys words"]
"""A typed key of any implementation, or the raw words of one; one key, or one per row."""


class SamplingParams(NamedTuple):
    """Sampling parameters: each field a scalar or `[B]`, applied in the order of the fields.

    Attributes:
      temperature: Divides the logits. 0 is greedy: all probability on the first largest logit. A value
        below the smallest normal number of the arithmetic, 1.2e-38 in float32, is greedy too.
      top_k: How many of the largest logits are kept, ties with the last of them included. 0 is off.
      top_p: The smallest set of largest probabilities that reaches this mass is kept, ties with the last of
        them included (nucleus sampling, Holtzman et al., 2020, arXiv 1904.09751). 1 is off.
      min_p: Tokens less probable than this fraction of the largest probability are dropped (Nguyen et al.,
        2024, arXiv 2407.01082). 0 is off.
    """

    temperature: ArrayLike = 1.0
    top_k: ArrayLike = 0
    top_p: ArrayLike = 1.0
    min_p: ArrayLike = 0.0


class CoupledNoise(NamedTuple):
    """Mark of drafts that `sample_coupled` drew, with the noise that `verify_coupled` uses; a pytree without leaves."""


class Draft(NamedTuple):
    """The proposal of a drafter: at most K tokens for each of B sequences.

    The length of a draft may depend on the tokens it contains and on their logits, never on the token that is left
    out. Dropping a token because its own q is small is not exact: with p = (.5, .5), q = (.9, .1) and one draft,
    dropping tokens of q < .4 emits the first token 55 times in 100. `ConfidenceDrafter` keeps the first token of low
    probability and ends the draft after it, which is exact.

    Attributes:
      tokens: Drafted tokens; a row with fewer than K drafts is padded with -1 (K may be 0).
      logits: The logits that each token was sampled from, before `sampling`; None for a
        deterministic drafter, whose q has all its probability on the drafted token.
      sampling: The parameters that the drafter sampled with; q is the distribution of `logits` under them.
        None: temperature 1, no filter.
      log_normalizers: logsumexp of the logits after `sampling`, as `sample` returns it; saves the
        verification from reading all of `logits` again. None: computed from `logits`. So are values beyond
        +-128 (a very low temperature), for which float32 is too coarse.
      noise: `CoupledNoise()` if `sample_coupled` drew the tokens: rules that need independent drafts refuse them.
        None: the draws share nothing with those of the verification.
    """

    tokens: Int[Array, "B K"]
    logits: Float[Array, "B K V"] | None = None
    sampling: SamplingParams | None = None
    log_normalizers: Float[Array, "B K"] | None = None
    noise: CoupledNoise | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """A language model as two pure functions and their parameters.

    `generate`, `stream`, `init` and `step` call a model in this way, and ask these things of it:

    - Prefill: the first call is on all P prompt columns at positions 0 to P - 1; columns after a prompt hold token 0.
    - Length: `max_length` is P + `max_new_tokens` + the longest draft; no position reaches it. A target whose
      `init_cache_fn` has an attribute `drops_positions` gets P + `max_new_tokens`, and must drop the entries of later
      positions. The models of this package do.
    - The first step feeds each prompt's last token again, at its own position.
    - Positions are absolute; a row's are consecutive, and rows differ. Writing a position of the cache
      again replaces its entry, so undoing a rejected draft costs nothing.
    - Mask: a token at position s attends to the slots 0 to s of its own row, those of the same call included.
      Slots after s may hold rejected drafts.
    - The cache that `apply_fn` returns has the structure, shapes and dtypes of the one that it was given.
    - Finished rows keep running on valid tokens and positions; their results are dropped.
    - Every leaf of the cache, and of `DecodeState`, has the batch first: a row is refilled by indexing all leaves.
    - Between steps the caller may set `limits`, `finished` and `num_draft` of the state.

    Attributes:
      params: The parameters, any pytree.
      apply_fn: `(params, tokens [B, T], positions [B, T], cache) -> (logits [B, T, V], cache)`.
      init_cache_fn: `(batch_size, max_length) -> cache`. It should raise an error if `max_length` exceeds the
        model's positions: JAX clamps an index beyond a table silently.
    """

    params: Any
    apply_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})
    init_cache_fn: Callable[..., Any] = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        """Names the two functions and counts the parameters."""
        sizes = [int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(self.params)]
        params = f"<{sum(sizes):,} numbers in {len(sizes)} arrays>"
        functions = (getattr(fn, "__qualname__", type(fn).__name__) for fn in (self.apply_fn, self.init_cache_fn))
        return "Model(params={}, apply_fn={}, init_cache_fn={})".format(params, *functions)


class Stats(NamedTuple):
    """Counts of a decoding loop.

    Attributes:
      num_steps: Steps of the loop.
      num_emitted: Tokens emitted by each row.
      num_drafted: Drafts verified at each draft position, over rows and steps, without those after an end token or a
        limit.
      num_accepted: Drafts accepted at each draft position, over rows and steps.
      status: The flags of `Verification.status` that each row has had in any step.
    """

    num_steps: Int[Array, ""]
    num_emitted: Int[Array, "B"]
    num_drafted: Int[Array, "K"]
    num_accepted: Int[Array, "K"]
    status: Int[Array, "B"]

    @classmethod
    def zeros(cls, batch_size: int, num_draft: int) -> "Stats":
        """Returns the counts before the first step, for B rows and K draft positions."""
        shapes = ((), batch_size, num_draft, num_draft, batch_size)
        return cls(*(jnp.zeros(shape, jnp.int32) for shape in shapes))


class Generation(NamedTuple):
    """Generated text in L = P + `max_new_tokens` columns, where P is the width of the prompts.

    Attributes:
      tokens: Each row's prompt (without its padding), the generated tokens, then `PAD_TOKEN`.
      lengths: Tokens of each row, prompt and generated, the end token included.
      log_probs: log p of generated tokens, 0 elsewhere.
      stats: Counts of the loop.
      verify_state: The state of a `verify_fn` that has one, such as `CalibratedRule`; else ().
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    log_probs: Float[Array, "B L"]
    stats: Stats
    verify_state: Any = ()


for _type in (SamplingParams, CoupledNoise, Draft, Verification, Stats, Generation):
    export.register_namedtuple_serialization(_type, serialized_name=f"specsamp_jax.{_type.__name__}")
