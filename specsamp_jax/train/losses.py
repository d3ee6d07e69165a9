"""Losses of models and drafters, and a loop that lowers them."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from specsamp_jax.sampling.atoms import acceptance_rate
from specsamp_jax.sampling.reduce import wide


def next_token_loss(logits: Float[Array, "B T V"], tokens: Int[Array, "B T1"]) -> Float[Array, "B T"]:
    """Cross-entropy in nats of each token given those before it; `tokens` has one more column than `logits`."""
    return optax.softmax_cross_entropy_with_integer_labels(wide(logits), tokens[:, 1:])


def kl_divergence(target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """KL(p || q) in nats: a smooth loss, large where the draft gives little probability to likely target tokens."""
    log_p, log_q = (jax.nn.log_softmax(wide(logits)) for logits in (target_logits, draft_logits))
    return jnp.where(log_p > -jnp.inf, jnp.exp(log_p) * (log_p - log_q), 0).sum(-1)


def total_variation(target_logits: Float[Array, "*b V"], draft_logits: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """TV(p, q), the probability that the token rule rejects a draft, which a drafter should minimise.

    Source: Zhou et al. (2024, DistillSpec, arXiv 2310.08461, section 4).
    """
    return 1 - acceptance_rate(target_logits, draft_logits)


def model_loss(graphdef: Any) -> Callable[[Any, Int[Array, "B T1"]], Float[Array, ""]]:
    """Returns `(params, tokens) -> loss`, the mean next-token loss of an NNX decoder split by `nnx.split`."""

    def loss_fn(params, tokens):
        return next_token_loss(text_logits(graphdef, params, tokens[:, :-1]), tokens).mean()

    return loss_fn


def distillation_loss(
    graphdef: Any, target: nnx.Module, divergence_fn: Callable[..., Float[Array, "B T"]]
) -> Callable[[Any, Int[Array, "B T1"]], Float[Array, ""]]:
    """Returns `(params, tokens) -> loss`, the mean divergence of a drafter from `target` over a text.

    Negative tokens are padding; predictions after them are not counted.
    """
    target_graphdef, target_params = nnx.split(target)

    def loss_fn(params, tokens):
        fed, counted = jnp.maximum(tokens[:, :-1], 0), tokens[:, :-1] >= 0
        target_logits = jax.lax.stop_gradient(text_logits(target_graphdef, target_params, fed))
        return _mean(divergence_fn(target_logits, text_logits(graphdef, params, fed)), counted)

    return loss_fn


def fit(
    loss_fn: Callable[[Any, Any], Float[Array, ""]],
    params: Any,
    batches: Iterable[Any],
    optimizer: optax.GradientTransformation,
) -> Iterator[tuple[Any, Float[Array, ""]]]:
    """Yields the parameters and the loss after each batch; the next step donates the buffers of yielded parameters.

    Args:
      loss_fn: `(params, batch) -> loss`.
      params: Initial parameters; their buffers are donated.
      batches: Batches for `loss_fn`.
      optimizer: The optax optimizer.
    """

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, batch):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = jax.jit(optimizer.init)(params)
    for batch in batches:
        params, opt_state, loss = update(params, opt_state, batch)
        yield params, loss


@partial(jax.jit, static_argnames=("batch_size", "length"))
def random_windows(
    key: Key[Array, ""], tokens: Int[Array, "N"], *, batch_size: int, length: int
) -> Int[Array, "B length"]:
    """Draws `batch_size` windows of `length` tokens at random positions of a long text."""
    starts = jax.random.randint(key, (batch_size, 1), 0, tokens.shape[0] - length + 1)
    return tokens[starts + jnp.arange(length)].astype(jnp.int32)


def text_logits(graphdef: Any, params: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    """Returns the logits after each token of a text, from an NNX decoder split by `nnx.split`."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return nnx.merge(graphdef, params)(tokens, positions)[0]


def _mean(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.where(counted, values, 0).sum() / jnp.maximum(counted.sum(), 1)
