"""The public verification functions: argument validation, random draws, dispatch."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from specsamp_jax import _checks
from specsamp_jax._types import Draft, KeyLike, SamplingParams, Uniforms, Verification
from specsamp_jax.rules import block as block_rule
from specsamp_jax.rules import kernels
from specsamp_jax.rules import sigmoid as sigmoid_rule
from specsamp_jax.rules import token as token_rule
from specsamp_jax.sampling import kernels as sampling_kernels
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.dispatch import dispatch
from specsamp_jax.sampling.filters import make_filter
from specsamp_jax.sampling.mesh_axes import with_automatic_axes
from specsamp_jax.sampling.reduce import at_least_16_bits
from specsamp_jax.sampling.streams import Purpose


def verify(
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None = None,
    *,
    implementation: str | None = None,
) -> Verification:
    """The accepted drafts and one more token, distributed exactly as the target's own sampling.

    The token rule: draft i is accepted with probability min(1, p_i(x_i)/q_i(x_i)); at the first rejection one
    token comes from max(0, p - q), normalised, and after K acceptances one from the target's last row. Each
    emitted token then has the law of a token sampled from p, whatever q is.

    Arithmetic is float32, or wider where the logits are. A rejected draft whose residual is zero to the last
    bit emits from p (`EMPTY_RESIDUAL`). A target row with NaN or +inf, or with no logit above -inf, accepts
    nothing and emits its first largest logit that is a number; a draft row of that kind, or one that gives its
    drafted token no probability, is rejected and the target's token taken from p, which is exact still. Both
    set `status`. Equal logits at a cutoff are kept together; a greedy row takes the first of them.

    Args:
      key: One JAX key, or one per row. With one per row, a row's result depends on that row alone. Keys of other
        implementations than threefry, and the raw words of `jax.random.PRNGKey`, are made threefry keys first.
      target_logits: Row i scores drafted token i, row K the bonus token. Any floating-point type. Logits, not
        probabilities, of which nothing tells them apart: take the logarithm of those.
      draft: What was proposed; see `Draft`.
      sampling: What is applied to `target_logits`; None is temperature 1 with no filter.
      implementation: None for the best on what the program is compiled for: the kernel on NVIDIA GPUs from Hopper
        on, XLA elsewhere. A program that is exported for CUDA by a process without a GPU has the kernel. Or
        "xla" or "pallas" by name.

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
    """The accepted drafts and one more token by block verification: exact, and never fewer tokens in expectation.

    The drafts of a sequence are judged together. Draft i is kept with all before it with a probability that looks at
    the product of the ratios p/q so far, so that a token the target likes makes up for one before it. Emitted tokens
    have the law of tokens sampled from p, as those of `verify` have, and are at least as many in expectation.

    Arithmetic, edges and errors are those of `verify`. A draft ends before a degenerate row, or before a token that q
    cannot have given, and the target's token follows it. `accept_prob` is min(1, p/q), which is not the probability
    with which this rule keeps a draft.

    Args:
      key: As in `verify`.
      target_logits: As in `verify`.
      draft: As in `verify`.
      sampling: As in `verify`.
      implementation: As in `verify`; there is no kernel yet.

    Returns:
      A `Verification`, as of `verify`.

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
    logits nearly everything is accepted and what is emitted follows the draft's distribution.

    `log_probs` are those of the softmax target all the same; under `jit` they cost nothing where unused.
    `status` looks at the row that emitted the last token only, for the others are not read.

    Args:
      key: As in `verify`.
      target_logits: As in `verify`.
      draft: As in `verify`. `log_normalizers` are not needed.
      sampling: As in `verify`. Greedy rows are exact; the rest of the approximation is unchanged.
      implementation: As in `verify`.
      alpha: The logit at which the sigmoid is one half. The default is what the paper's authors released.
      beta: alpha plus the width of the sigmoid, in logits.

    Returns:
      A `Verification`, as of `verify`.

    Raises:
      ValueError: As in `verify`, or beta is not above alpha.
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
    if not beta > alpha:
        raise ValueError(f"beta must be above alpha; got alpha = {alpha}, beta = {beta}. Are they swapped?")
    constants = {"alpha": alpha, "beta": beta}
    return _verify("sigmoid", constants, key, target_logits, draft, sampling, implementation)


CORES = {
    "token": (token_rule.verify_token, kernels.verify_token),
    "block": (block_rule.verify_block, None),
    "sigmoid": (sigmoid_rule.verify_sigmoid, kernels.verify_sigmoid),
}
"""Each rule's core in plain JAX, and its kernel if it has one."""


def _verify(
    rule: str,
    constants: dict[str, int | float],
    key: KeyLike,
    target_logits: Float[Array, "B K1 V"],
    draft: Draft,
    sampling: SamplingParams | None,
    implementation: str | None,
) -> Verification:
    _checks.logits("target_logits", target_logits, "B K+1 V")
    _checks.draft(draft, target_logits)
    batch_size, num_rows, _ = target_logits.shape
    if sampling is not None:
        _checks.sampling("sampling", sampling, batch_size)
    _checks.implementation(implementation)
    target_logits = at_least_16_bits(jnp.asarray(target_logits))
    draft = draft._replace(tokens=_checks.int32(draft.tokens))
    if draft.logits is not None:
        draft = draft._replace(logits=at_least_16_bits(jnp.asarray(draft.logits)))
    keys = streams.row_keys(key, batch_size)
    # Numbers among the parameters are compiled in; as arguments of a branch they would be arrays.
    draft_sampling, draft = draft.sampling, draft._replace(sampling=None)

    def decide(target_logits, draft, keys, sampling, draft_sampling):
        """The rule on draws from the rows' keys."""
        # The branches of `dispatch` may close over nothing that varies over mesh axes: arrays are arguments.
        numbers, arrays = sampling_kernels.split(sampling, draft_sampling)

        def with_filters(fn, make_filters):
            def run(target_logits, draft, draws, arrays):
                sampling, draft_sampling = sampling_kernels.merge(numbers, arrays)
                draft_logits = target_logits[:, :0] if draft.logits is None else draft.logits
                filters = make_filters((target_logits, sampling), (draft_logits, draft_sampling))
                # The emission's two come first, so that no draw depends on how many drafts there are.
                uniforms = Uniforms(accept=draws[:, 2:], emit=draws[:, :2])
                return fn(target_logits, filters[0], draft, filters[1], uniforms, **constants)

            return run

        core, kernel = CORES[rule]
        core = with_filters(core, lambda *rows: [make_filter(*one) for one in rows])
        kernel = kernel and with_filters(kernel, sampling_kernels.make_filters)
        arguments = target_logits, draft, streams.uniforms(keys, Purpose.VERIFY, num_rows + 1), arrays
        return dispatch(core, kernel, arguments, kernels.why_not(target_logits, draft), implementation)

    return with_automatic_axes(decide, target_logits, draft, keys, sampling, draft_sampling)
