"""The public verification functions: argument validation, random draws, dispatch."""

import functools
from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import CoupledNoise, Draft, KeyLike, SamplingParams, Uniforms, Verification
from specsamp_jax.rules import block as block_rule
from specsamp_jax.rules import calibrated as calibrated_rule
from specsamp_jax.rules import coupled as coupled_rule
from specsamp_jax.rules import kernels
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.rules import token as token_rule
from specsamp_jax.sampling import gumbel, streams
from specsamp_jax.sampling import kernels as sampling_kernels
from specsamp_jax.sampling.dispatch import dispatch
from specsamp_jax.sampling.filters import call_unfiltered_if_off, make_filter
from specsamp_jax.sampling.mesh_axes import replace_empty, with_automatic_axes
from specsamp_jax.sampling.reduce import at_least_16_bits


def verify(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
) -> Verification:
    """Returns the accepted drafts and one more token, distributed exactly as samples of the target.

    The token rule: draft i is accepted with probability min(1, p_i(x_i)/q_i(x_i)); at the first rejection one
    token comes from max(0, p - q), normalised, and after K acceptances one from the target's last row. Each
    emitted token is then distributed as a token sampled from p, for any q.

    Arithmetic is float32, or the dtype of the logits if it is wider. A rejected draft whose residual is exactly
    zero emits from p (`EMPTY_RESIDUAL`). A target row with NaN or +inf, or with no logit above -inf, accepts
    no draft and emits its first largest logit, NaN ignored. The draft of a degenerate draft row, and a draft whose q is
    zero, is rejected and the next token sampled from p, which is still exact. Both set `status`. All logits equal
    to a cutoff are kept; a greedy row takes the first of equal largest logits.

    Args:
      key: One JAX key, or one per row. With one per row, a row's result depends on that row alone. Keys of other
        implementations than threefry, and the raw words of `jax.random.PRNGKey`, are converted to threefry keys.
      target_logits: Row i scores drafted token i, row K the bonus token. Any floating-point type. Probabilities
        cannot be told from logits: pass their logarithm.
      draft: The proposal; see `Draft`.
      sampling: Temperature and filters for `target_logits`; None is temperature 1 with no filter.
      implementation: None chooses by the platform of the compiled program: the kernel on NVIDIA GPUs from Hopper
        on, XLA elsewhere. A program that is exported for CUDA by a process without a GPU contains the kernel.
        "xla" and "pallas" ask for one by name.

    Returns:
      A `Verification` of B rows; `num_accepted + 1` tokens of each are emitted.

    Raises:
      ValueError: An argument has a wrong shape, type or value.
      NotImplementedError: The implementation asked for cannot run here.

    Source: Leviathan et al. (2023, arXiv 2211.17192, algorithm 1); Chen et al. (2023, arXiv 2302.01318,
    algorithm 2).

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> target_logits = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5]]]))
      >>> draft = ss.Draft(jnp.array([[1]]), logits=target_logits[:, :1])
      >>> int(ss.verify(jax.random.key(0), target_logits, draft).num_accepted[0])
      1
    """
    return _verify("token", {}, key, target_logits, draft, sampling, implementation)


def verify_block(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
) -> Verification:
    """Returns the accepted drafts and one more token by block verification: exact, in expectation never fewer tokens.

    The drafts of a sequence are accepted jointly. The probability of keeping the drafts up to i depends on the product
    of their ratios p/q, so that a token with a large ratio can compensate for one before it. Emitted tokens are
    distributed as tokens sampled from p, as those of `verify`, and are at least as many in expectation. The number of
    accepted drafts is found in at most 64 rounds, each of which steps back by one draft, or samples a token from p and
    tests it. Only a sequence that is then undecided needs sums over rows of both models.

    Arithmetic, edges and errors are those of `verify`. A draft is cut before a degenerate row and before a token of
    q = 0, and the next token is sampled from p. `accept_prob` is min(1, p/q), which is not the probability with which
    this rule keeps a draft.

    Args:
      key: As in `verify`.
      target_logits: As in `verify`.
      draft: As in `verify`.
      sampling: As in `verify`.
      implementation: As in `verify`.

    Returns:
      A `Verification`, as in `verify`.

    Raises:
      ValueError: As in `verify`.
      NotImplementedError: As in `verify`.

    Source: Sun et al. (2024, arXiv 2403.10444, algorithm 2).

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> target_logits = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5]]]))
      >>> draft = ss.Draft(jnp.array([[1]]), logits=target_logits[:, :1])
      >>> int(ss.verify_block(jax.random.key(0), target_logits, draft).num_accepted[0])
      1
    """
    return _verify("block", {}, key, target_logits, draft, sampling, implementation)


def verify_coupled(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
    positions: ArrayLike = 0,
) -> Verification:
    """Returns the drafts that equal the target's own samples, and the target's sample after them: exact, one text.

    At each position the target samples the first largest of `log p + G`, where the Gumbel noise `G` is a function of
    the row's key, the position and the token's id. Drafts are accepted while they equal these samples, and the first
    sample that no draft equals is emitted too. So the text is that of sampling from the target alone with the same key,
    whatever was drafted: another drafter, or another number of drafts, changes the number of steps and no token. Any
    drafts may be verified. Those that `sample_coupled` draws with the same key are accepted with probability at least
    (1 - TV)/(1 + TV), where TV is the total variation between p and q; under `verify` it is 1 - TV.

    Arithmetic, degenerate rows, `status` and errors are those of `verify`, but acceptance does not look at q.
    `accept_prob` is min(1, p/q), which is not the probability with which this rule keeps a draft.

    Args:
      key: As in `verify`. Use one key for all steps of a text, with the `positions` of each step.
      target_logits: As in `verify`.
      draft: As in `verify`, drawn in any way. `logits` serve `accept_prob` and `status` alone.
      sampling: As in `verify`.
      implementation: As in `verify`; there is no kernel yet.
      positions: Position of each row's first drafted token in its text, which is the number of tokens before it. With
        the default 0 for all, every step needs a key of its own, and a text depends on where its steps began.

    Returns:
      A `Verification`, as in `verify`.

    Raises:
      ValueError: As in `verify`.
      NotImplementedError: As in `verify`.

    Source: Daliri et al. (2024, arXiv 2408.07978), with Gumbel noise.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> target_logits = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5]]]))
      >>> key, texts = jax.random.key(0), []
      >>> for drafted in (0, 1):
      ...     result = ss.verify_coupled(key, target_logits, ss.Draft(jnp.array([[drafted]])))
      ...     texts.append(result.tokens[0, 0].item())
      >>> texts[0] == texts[1]
      True
    """
    return _verify("coupled", {}, key, target_logits, draft, sampling, implementation, positions=positions)


def verify_sigmoid(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
    alpha: int | float = -1e4,
    beta: int | float = 1e4,
) -> Verification:
    """Approximate: NOT the target's distribution. The paper's sigmoid variant of speculative sampling.

    Softmax is replaced, element by element, by `s(z) = sigmoid((z - alpha)/(beta - alpha))` of the filtered
    logits, so that no sum over the vocabulary is needed before a draft is accepted: acceptance is
    min(1, s_p(x)/s_q(x)), the residual max(0, s_p - s_q), the bonus s_p. With beta - alpha far above the
    logits nearly all drafts are accepted and the emitted tokens follow the draft's distribution.

    `log_probs` are those of the softmax target; under `jit` they cost nothing if unused. `status` covers only the row
    that emitted the last token, because the other rows are not read. A row whose scores all underflow, about 88 widths
    below alpha in float32, is degenerate: it yields its first largest logit.

    Args:
      key: As in `verify`.
      target_logits: As in `verify`.
      draft: As in `verify`. `log_normalizers` are not needed.
      sampling: As in `verify`. Greedy rows are exact; the rest of the approximation is unchanged.
      implementation: As in `verify`.
      alpha: The logit at which the sigmoid is one half. The default is that of the paper's released code.
      beta: alpha plus the width of the sigmoid, in logits.

    Returns:
      A `Verification`, as in `verify`.

    Raises:
      ValueError: As in `verify`, or beta is not above alpha, or their difference is no float32.
      NotImplementedError: As in `verify`.

    Source: Wagner et al. (2024, arXiv 2406.11016).

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> target_logits = jnp.log(jnp.array([[[0.1, 0.9], [0.5, 0.5]]]))
      >>> draft = ss.Draft(jnp.array([[0]]), logits=jnp.log(jnp.array([[[0.9, 0.1]]])))
      >>> result = ss.verify_sigmoid(jax.random.key(0), target_logits, draft)
      >>> print(f"{result.accept_prob[0, 0]:.4f}, where p/q is {0.1 / 0.9:.4f}")
      1.0000, where p/q is 0.1111
    """
    sigmoid_rule.check_width(alpha, beta)
    constants = {"alpha": alpha, "beta": beta}
    return _verify("sigmoid", constants, key, target_logits, draft, sampling, implementation)


def _uniforms(keys: Key[Array, "B"], positions: None, num_rows: int) -> Uniforms:
    return streams.verification_uniforms(keys, num_rows - 1)


def _block_uniforms(keys: Key[Array, "B"], positions: None, num_rows: int) -> Uniforms:
    return streams.block_uniforms(keys, num_rows - 1)


CORES = {
    "token": (token_rule.verify_token, kernels.verify_token_from_keys, _uniforms),
    "block": (block_rule.verify_block, kernels.verify_block_from_keys, _block_uniforms),
    "calibrated": (calibrated_rule.verify_calibrated, None, _uniforms),
    "coupled": (coupled_rule.verify_coupled, None, gumbel.noise_keys),
    "sigmoid": (sigmoid_rule.verify_sigmoid, kernels.verify_sigmoid_from_keys, _uniforms),
}
"""Each rule's core in plain JAX, the function that runs its kernel if it has one, and its draws from keys."""


@allow_rank_promotion
def _verify(
    rule: str,
    constants: dict[str, int | float],
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None,
    implementation: str | None,
    row_data: dict[str, Array] | None = None,
    positions: ArrayLike | None = None,
) -> Any:
    """Returns what the core returns. `row_data` are further arrays for it, by name, with the batch first."""
    _checks.logits("target_logits", target_logits, "B K+1 V")
    _checks.draft(draft, target_logits)
    _check_noise(rule, draft)
    batch_size, num_rows, vocab_size = target_logits.shape
    if sampling is not None:
        _checks.sampling("sampling", sampling, batch_size)
    if rule == "coupled":
        positions = gumbel.position_array(positions, batch_size)
    _checks.implementation(implementation)
    target_logits = at_least_16_bits(jnp.asarray(target_logits))
    draft = draft._replace(tokens=_checks.int32(draft.tokens), noise=None)
    if draft.logits is not None:
        draft = draft._replace(logits=at_least_16_bits(jnp.asarray(draft.logits)))
    words = streams.words(key, batch_size)
    # Python numbers among the parameters stay static; as arguments of a branch they would become arrays.
    draft_sampling, draft = draft.sampling, replace_empty(draft._replace(sampling=None))

    def decide(target_logits, draft, words, row_data, positions, sampling, draft_sampling):
        """Applies the rule, with uniforms drawn from the rows' keys."""
        # The branches of `dispatch` must not close over arrays that vary over mesh axes: arrays are arguments.
        numbers, arrays = sampling_kernels.split(sampling, draft_sampling)
        rule_core, rule_kernel, draws_fn = CORES[rule]

        def core(target_logits, draft, words, row_data, positions, arrays):
            draws = draws_fn(streams.row_keys(words, batch_size), positions, num_rows)

            def apply(sampling, draft_sampling):
                target_filter = make_filter(target_logits, sampling)
                drafted = target_logits[:, :0] if draft.logits is None else draft.logits
                draft_filter = make_filter(drafted, draft_sampling)
                return rule_core(target_logits, target_filter, draft, draft_filter, draws, **row_data, **constants)

            return call_unfiltered_if_off(apply, *sampling_kernels.merge(numbers, arrays), vocab_size=vocab_size)

        def kernel(target_logits, draft, words, row_data, positions, arrays):
            sampling, draft_sampling = sampling_kernels.merge(numbers, arrays)
            return rule_kernel(words, target_logits, sampling, draft, draft_sampling, **row_data, **constants)

        arguments = target_logits, draft, words, row_data, positions, arrays
        why_not_fn = functools.partial(kernels.why_not, target_logits, draft)
        return dispatch(core, kernel if rule_kernel else None, arguments, why_not_fn, implementation)

    return with_automatic_axes(decide, target_logits, draft, words, row_data or {}, positions, sampling, draft_sampling)


def _check_noise(rule: str, draft: Draft) -> None:
    """Raises ValueError if the rule needs independent drafts and these are coupled to the target."""
    if not isinstance(draft.noise, CoupledNoise | None):
        raise ValueError(f"draft.noise must be None or CoupledNoise(); got {type(draft.noise).__name__}.")
    if rule != "coupled" and draft.noise is not None:
        raise ValueError(
            "draft.noise must be None: these drafts were drawn by sample_coupled, and the text is biased where their "
            "noise meets a rule of p and q. Draw the drafts with sample, or verify them with verify_coupled."
        )
