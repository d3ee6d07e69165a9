"""Distillation of a Whisper's decoder: the target's transcripts as labels, and the loss on the encoder's states."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax._types import PAD_TOKEN, SamplingParams
from specsamp_jax.decoding.generate import generate
from specsamp_jax.models import Whisper
from specsamp_jax.models.cache import CacheSpec
from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.sampling.atoms import acceptance_rate
from specsamp_jax.speech import Speech
from specsamp_jax.train.loop import LossFn, Progress, ProgressFn

BLOCKS = nnx.PathContains("blocks")
"""The part of a decoder that is trained; its embeddings, positions and last norm stay the target's."""


class SpeechData(NamedTuple):
    """Encoded windows and the target's transcripts of them.

    Attributes:
      states: The encoder's states of N windows.
      tokens: Prompt, transcript and end token of each; after them `PAD_TOKEN`.
      num_prompt: Tokens of each prompt.
    """

    states: Float[Array, "N S D"]
    tokens: Int[np.ndarray, "N T"]
    num_prompt: int

    def select(self, rows: Int[np.ndarray, "n"]) -> "SpeechData":
        """Returns some of the windows."""
        return SpeechData(self.states[jnp.asarray(rows)], self.tokens[rows], self.num_prompt)


def label(
    target: Speech,
    features: Sequence[Float[np.ndarray, "M F"]],
    *,
    language: str,
    max_new_tokens: int,
    batch_size: int,
    progress_fn: ProgressFn,
) -> SpeechData:
    """Returns the states of windows and the target's greedy transcripts without timestamps.

    Args:
      target: The target.
      features: Log-mel features of each window.
      language: A code that the target knows; for an English-only model it is not used.
      max_new_tokens: The longest transcript; longer ones are cut.
      batch_size: Windows decoded at once. The last batch is filled up, so that one program is compiled.
      progress_fn: See `ProgressFn`.
    """
    settings = target.settings
    prompt = settings.prompt(language=language if settings.languages else None, task=None, timestamps=False)
    rules = settings.rules(len(prompt), timestamps=False)
    states, tokens = [], []
    for begin in range(0, len(features), batch_size):
        batch = np.stack(features[begin : begin + batch_size])
        size = len(batch)
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - size, axis=0)])
        encoded = encode(target.module, filled)
        result = generate(
            jax.random.key(0),  # greedy: nothing is drawn
            np.tile(np.array(prompt, np.int32), (batch_size, 1)),
            target=decoder_model(target.module, encoded),
            draft=None,
            max_new_tokens=max_new_tokens,
            sampling=SamplingParams(temperature=0.0),
            eos_token=settings.end_tokens,
            process_logits_fn=rules,
        )
        column = np.arange(result.tokens.shape[1])
        rows = np.where(column < np.asarray(result.lengths)[:, None], np.asarray(result.tokens), PAD_TOKEN)
        tokens.append(rows[:size].astype(np.int32))
        states.append(encoded[:size])
        progress_fn(Progress("transcribing", begin + size, len(features)))
    return SpeechData(jnp.concatenate(states), np.concatenate(tokens), len(prompt))


def batches(data: SpeechData, batch_size: int, seed: int) -> Callable[[int], dict[str, Array]]:
    """Returns the function from a step to its batch: all windows once in random order, then again in another.

    Args:
      data: The windows.
      batch_size: Windows per batch.
      seed: Of the orders.
    """
    size = min(batch_size, len(data.tokens))
    per_epoch = len(data.tokens) // size
    orders: dict[int, np.ndarray] = {}

    def batch_fn(step: int) -> dict[str, Array]:
        epoch, index = divmod(step, per_epoch)
        if epoch not in orders:
            orders.clear()
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(len(data.tokens))
        return _batch(data, orders[epoch][index * size : (index + 1) * size])

    return batch_fn


def in_order(data: SpeechData, batch_size: int) -> Iterator[dict[str, Array]]:
    """Yields all windows once; the last batch is filled up with windows without text."""
    for begin in range(0, len(data.tokens), batch_size):
        rows = np.arange(begin, begin + batch_size)
        batch = _batch(data, np.minimum(rows, len(data.tokens) - 1))
        yield {**batch, "tokens": jnp.where((rows < len(data.tokens))[:, None], batch["tokens"], PAD_TOKEN)}


def _batch(data: SpeechData, rows: Int[np.ndarray, "B"]) -> dict[str, Array]:
    return {"states": data.states[jnp.asarray(rows)], "tokens": jnp.asarray(data.tokens[rows])}


class Decoders(NamedTuple):
    """A target's and a drafter's decoder, taken apart for training.

    Attributes:
      params: The drafter's blocks, float32.
      frozen: The rest of the drafter, and the target.
      logits_fn: `(params, frozen, batch) -> (target's logits, drafter's logits, mask)`; the mask is True where a
        token of the transcript or its end follows.
    """

    params: Any
    frozen: Any
    logits_fn: Callable[[Any, Any, Any], tuple[Float[Array, "B T V"], Float[Array, "B T V"], Bool[Array, "B T"]]]


def take_apart(target: Whisper, draft: Whisper, num_prompt: int) -> Decoders:
    """Returns the decoders of a target and a drafter with the same encoder.

    Args:
      target: The target.
      draft: The drafter; its blocks are trained.
      num_prompt: Tokens of a prompt, which the drafter need not predict.
    """
    target_graph, target_params = nnx.split(target.decoder)
    draft_graph, params, rest = nnx.split(draft.decoder, BLOCKS, ...)
    specs = [_cache_spec(module) for module in (target, draft)]

    def logits_fn(params, frozen, batch):
        tokens = batch["tokens"]
        fed = jnp.maximum(tokens[:, :-1], 0)
        mask = (tokens[:, 1:] >= 0) & (jnp.arange(fed.shape[1]) >= num_prompt - 1)
        positions = jnp.broadcast_to(jnp.arange(fed.shape[1]), fed.shape)
        decoders = nnx.merge(target_graph, frozen["target"]), nnx.merge(draft_graph, params, frozen["draft"])
        p, q = (
            decoder(fed, positions, decoder.read(batch["states"]), spec(*fed.shape))[0]
            for decoder, spec in zip(decoders, specs, strict=True)
        )
        return jax.lax.stop_gradient(p), q, mask

    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    return Decoders(params, {"target": target_params, "draft": rest}, logits_fn)


def loss_of(decoders: Decoders, divergence_fn: Callable[..., Float[Array, "B T"]]) -> LossFn:
    """Returns the mean divergence over the tokens of the transcripts."""

    def loss_fn(params, frozen, batch):
        p, q, mask = decoders.logits_fn(params, frozen, batch)
        return jnp.where(mask, divergence_fn(p, q), 0).sum() / jnp.maximum(mask.sum(), 1)

    return loss_fn


def agreement_of(logits_fn: Any) -> Callable[[Any, Any, Any], Float[Array, "3"]]:
    """Returns a compiled function of params, frozen and batch: sums of two rates over positions, and their number.

    The rates are the probability that a draft is accepted at temperature 1, and at temperature 0, where it is accepted
    if it is the target's most probable token.
    """

    @jax.jit
    def agreement(params, frozen, batch):
        p, q, mask = logits_fn(params, frozen, batch)
        same = p.argmax(-1) == q.argmax(-1)
        return jnp.stack([jnp.where(mask, rate, 0).sum() for rate in (acceptance_rate(p, q), same, mask)]).astype(
            jnp.float32
        )

    return agreement


def _cache_spec(module: Whisper) -> CacheSpec:
    config = module.config
    heads = config.decoder_attention_heads
    return CacheSpec(config.decoder_layers, heads, config.d_model // heads, module.dtype)
