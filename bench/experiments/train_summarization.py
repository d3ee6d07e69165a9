"""Fine-tunes SmolLM2 on descriptions and synopses, and distils a drafter of an eighth of its size from it.

    python bench/experiments/train_summarization.py SMOLLM2_FOLDER [--target-steps N] [--draft-steps N]
                                                                   [--seconds S] [--draft-seconds S]

Writes `target` and `drafter` beside the pairs, with their losses on the held-out pairs in training.json. The
computation is in bfloat16, the weights are float32. About five minutes on an H100.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import summarization_data as data
from evaluate import show
from flax import nnx
from summarization import DRAFTER, MAX_NEW_TOKENS, TARGET, WIDTH, answer_tokens, end_token, prompt_tokens
from tasks import pad

from specsamp_jax import models
from specsamp_jax.models import load_module
from specsamp_jax.text import CheckpointTokenizer, load_tokenizer
from specsamp_jax.train import kl_divergence, next_token_loss

LENGTH = WIDTH + MAX_NEW_TOKENS
DRAFTER_SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
"""17 million parameters, of which 12.6 are the embedding of 49,152 tokens."""

DESCRIPTION_WEIGHT = 0.3
"""Weight of the tokens of a description in the drafter's loss; those of a synopsis have weight 1."""


class Texts(NamedTuple):
    """Prompts with their answers.

    Attributes:
      tokens: Prompt, answer, then 0.
      weights: The weight in the loss of the prediction after each token but the last.
      answers: True where an answer's token is predicted.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray


def encode(tokenizer: CheckpointTokenizer, pairs: list[data.Pair]) -> Texts:
    """The texts of some pairs, each of `LENGTH` tokens."""
    end = end_token(tokenizer)
    prompts = [prompt_tokens(tokenizer, pair.description) for pair in pairs]
    rows = [p + answer_tokens(tokenizer, pair.synopsis, end) for p, pair in zip(prompts, pairs, strict=True)]
    tokens, lengths = pad([*rows, [0] * LENGTH], 0)
    tokens, lengths = tokens[:-1], lengths[:-1, None]
    position, begin = np.arange(LENGTH - 1), np.array([len(p) for p in prompts])[:, None]
    answers = (position >= begin - 1) & (position < lengths - 1)
    weights = np.where(answers, 1, np.where(position < lengths - 1, DESCRIPTION_WEIGHT, 0)).astype(np.float32)
    return Texts(tokens, weights, answers)


def logits(graphdef: Any, params: Any, tokens: jax.Array) -> jax.Array:
    """Logits after each token of some texts."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return nnx.merge(graphdef, params)(tokens, positions)[0]


def mean(values: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean."""
    return (values * weights).sum() / jnp.maximum(weights.sum(), 1)


def fit(
    loss_fn: Callable[..., jax.Array],
    params: Any,
    texts: Texts,
    *,
    steps: int,
    seconds: float,
    batch_size: int,
    learning_rate: float,
    name: str,
    fixed: Any = None,
) -> tuple[Any, int]:
    """Returns trained parameters and the number of steps; the learning rate falls as a cosine of steps or seconds.

    `fixed` are arrays that `loss_fn(params, batch, fixed)` reads: as a closure they would be constants of the program.
    """
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95), optax.add_decayed_weights(0.01)
    )
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit(donate_argnums=(0, 1))
    def update(params, opt_state, batch, rate, fixed):
        loss, gradients = jax.value_and_grad(loss_fn)(params, batch, fixed)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, jax.tree.map(lambda u: -rate * u, updates)), opt_state, loss

    rng, order = np.random.default_rng(0), np.zeros(0, int)
    start, losses = time.monotonic(), []
    step = 0
    for step in range(1, steps + 1):
        if len(order) < batch_size:
            order = rng.permutation(len(texts.tokens))
        index, order = order[:batch_size], order[batch_size:]
        # The first step compiles: the clock starts after it.
        start = time.monotonic() if step == 2 else start
        progress = max(step / steps, (time.monotonic() - start) / seconds)
        if progress > 1 and step > 2:
            break
        # A Python number at every step: NumPy's have another type, for which the program would be compiled again.
        rate = learning_rate * float(min(step / 50, (1 + np.cos(np.pi * min(progress, 1))) / 2))
        params, opt_state, loss = update(params, opt_state, Texts(*(part[index] for part in texts)), rate, fixed)
        losses.append(loss)
        if step % 50 == 0 or step == steps:
            show(step, steps, f"{name}: loss {np.mean(jax.device_get(losses[-50:])):.3f}")
    return params, step


def float32(params: Any) -> Any:
    """Parameters in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)


def project(head: jax.Array, width: int) -> jax.Array:
    """The head `[F, V]` in the `width` directions in which it is largest, scaled to logits of standard deviation 1."""
    _, vectors = np.linalg.eigh(np.asarray(head @ head.T, np.float64))
    projected = jnp.asarray(vectors[:, : -width - 1 : -1].T, jnp.float32) @ head
    return projected / jnp.linalg.norm(projected, axis=0).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tunes SmolLM2 and distils a drafter.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target-steps", type=int, default=1400)
    parser.add_argument("--draft-steps", type=int, default=4200)
    parser.add_argument("--seconds", type=float, default=150, help="at most, for each of the two")
    parser.add_argument("--draft-seconds", type=float, help="at most, for the drafter, in place of --seconds")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--pairs", type=int)
    options = parser.parse_args()

    tokenizer, pairs = load_tokenizer(options.folder), data.read()
    train, test = (encode(tokenizer, pairs[part][: options.pairs]) for part in ("train", "test"))
    module = load_module(options.folder, dtype=jnp.bfloat16)
    graphdef, params = nnx.split(module)
    seconds, draft_seconds = options.seconds, options.draft_seconds or options.seconds
    shared = {"batch_size": options.batch_size}
    begin = time.monotonic()

    def target_loss(params, batch, _):
        loss = next_token_loss(logits(graphdef, params, batch.tokens[:, :-1]), batch.tokens)
        return mean(loss, batch.answers)

    params, target_steps = fit(
        target_loss,
        float32(params),
        train,
        steps=options.target_steps,
        seconds=seconds,
        learning_rate=1e-4,
        name="target",
        **shared,
    )
    target_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    nnx.update(module, target_params)
    models.save_checkpoint(TARGET, module)

    config = models.LlamaConfig(
        vocab_size=module.config.vocab_size,
        rope_theta=module.config.rope_theta,
        tie_word_embeddings=True,
        max_position_embeddings=module.config.max_position_embeddings,
        **DRAFTER_SIZES,
    )
    drafter = models.Llama(config, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    drafter.vocabulary.head.set_value(project(params["vocabulary"]["head"][...], config.hidden_size))
    draft_graphdef, draft_params = nnx.split(drafter)

    def divergence(target_params, params, batch):
        fed = batch.tokens[:, :-1]
        p = jax.lax.stop_gradient(logits(graphdef, target_params, fed))
        return p, logits(draft_graphdef, params, fed)

    def draft_loss(params, batch, target_params):
        return mean(kl_divergence(*divergence(target_params, params, batch)), batch.weights)

    draft_params, draft_steps = fit(
        draft_loss,
        draft_params,
        train,
        steps=options.draft_steps,
        seconds=draft_seconds,
        learning_rate=1e-3,
        name="drafter",
        fixed=target_params,
        **shared,
    )
    nnx.update(drafter, draft_params)
    models.save_checkpoint(DRAFTER, drafter)

    @jax.jit
    def held_out(target_params, params, batch):
        p, q = divergence(target_params, params, batch)
        overlap = jnp.minimum(jax.nn.softmax(p), jax.nn.softmax(q)).sum(-1)
        agree = p.argmax(-1) == q.argmax(-1)
        loss = next_token_loss(p, batch.tokens), next_token_loss(q, batch.tokens)
        return [mean(x, batch.answers) for x in (*loss, overlap, agree)]

    size = min(16, len(test.tokens))
    starts = range(0, len(test.tokens) - size + 1, size)
    found = [held_out(target_params, draft_params, Texts(*(part[i : i + size] for part in test))) for i in starts]
    names = "target_loss", "drafter_loss", "overlap", "same_first_choice"
    about = dict(zip(names, np.mean(jax.device_get(found), axis=0).round(4).tolist(), strict=True))
    sizes = [sum(x.size for x in jax.tree.leaves(each)) for each in (target_params, draft_params)]
    about |= {"target_steps": target_steps, "draft_steps": draft_steps, "batch_size": options.batch_size}
    about |= {"parameters": sizes, "seconds": round(time.monotonic() - begin), "device": jax.devices()[0].device_kind}
    text = json.dumps(about, indent=1)
    print(text)
    (data.FOLDER / "training.json").write_text(text + "\n")
    for folder in (TARGET, DRAFTER):
        for path in options.folder.glob("*.json"):
            if path.name != "config.json" and "index" not in path.name:
                (folder / path.name).write_bytes(path.read_bytes())


if __name__ == "__main__":
    main()
