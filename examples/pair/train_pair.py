"""Train the pair in specsamp_jax/cli/assets: a target on docstrings, then a drafter on the target's distribution.

    python examples/pair/train_pair.py --out .work/trained

Reads .work/pair/{train,held_out}.npy, which make_corpus.py writes. Writes OUT/target, OUT/drafter and
OUT/training.json. `--scale 0.001` makes a trial run of a few steps. The pair in the package took 13 minutes on an H100.
"""

import json
import os
import platform
import time
from pathlib import Path

import click
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import specsamp_jax as ss
from specsamp_jax import train
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.models import Llama, LlamaConfig, from_nnx, load_module, save_checkpoint

SEED = 0
END = 0  # the id of <|end|>, the first token of every document
LENGTH = 384
BATCH = 96
DISTIL_BATCH = 48
EVALUATION_BATCH = 32
VOCABULARY = {"vocab_size": 4096, "tie_word_embeddings": True, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
TARGET = LlamaConfig(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    **VOCABULARY,
)
DRAFTER = LlamaConfig(
    hidden_size=112,
    intermediate_size=232,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    **VOCABULARY,
)
TARGET_STEPS = 7500
DISTIL_STEPS = {"kl_divergence": 10_000, "total_variation": 40_000}
SAMPLED_ROWS = 40 * 1024  # rows of text sampled from the target: half of the drafter's training data
SAMPLED_AT_ONCE = 2048
PROMPT = 16
NUM_CONTINUATIONS, CONTINUED_FROM, CONTINUED_BY = 512, 32, 128  # the held-out documents on which acceptance is measured


def optimizer(num_steps: int, rate: float) -> optax.GradientTransformation:
    """AdamW under a cosine, after a short warm-up."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, min(300, num_steps // 10 + 1), num_steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def run(name, loss_fn, module, batches, num_steps, rate) -> None:
    """Trains `module` in place and prints the loss every 1,000 steps."""
    began = time.perf_counter()
    graphdef, params = nnx.split(module)
    updates = train.fit(loss_fn(graphdef), params, batches, optimizer(num_steps, rate))
    for step, (trained, loss) in enumerate(updates):
        params = trained
        if step % 1000 == 0 or step == num_steps - 1:
            print(f"{name} {step:6d} loss {float(loss):.4f} {time.perf_counter() - began:6.1f} s", flush=True)
    nnx.update(module, params)


def windows(tokens, keys, batch_size):
    """Yields batches of random windows of the corpus, one per key."""
    for key in keys:
        yield train.random_windows(key, tokens, batch_size=batch_size, length=LENGTH + 1)


def half_sampled(tokens, sampled, num_steps, seed):
    """Yields batches, half corpus and half text sampled from the target."""
    rng = np.random.default_rng(seed)
    keys = (jax.random.fold_in(jax.random.key(seed), step) for step in range(num_steps))
    for batch in windows(tokens, keys, DISTIL_BATCH // 2):
        yield jnp.concatenate([batch, sampled[rng.integers(len(sampled), size=DISTIL_BATCH // 2)]])


def documents(stream: np.ndarray, num: int, length: int, seed: int) -> np.ndarray:
    """Returns the first `length` tokens of `num` random documents that are longer, `[num, length]`."""
    starts = np.flatnonzero(stream == END)
    long_enough = starts[:-1][np.diff(starts) > length]
    chosen = np.random.default_rng(seed).choice(long_enough, num, replace=num > len(long_enough))
    return stream[chosen[:, None] + np.arange(length)].astype(np.int32)


def sample_text(target, stream, num_rows, seed) -> jax.Array:
    """Samples text from the target at temperature 1; each row continues the beginning of a training document."""
    rows, continuation = [], LENGTH + 1 - PROMPT
    for i, start in enumerate(range(0, num_rows, SAMPLED_AT_ONCE)):
        prompt = documents(stream, min(SAMPLED_AT_ONCE, num_rows - start), PROMPT, seed + i)
        text = ss.generate(
            jax.random.key(seed + i), prompt, target=target, draft=None, max_new_tokens=continuation, eos_token=END
        )
        rows.append(text.tokens)
    return jnp.concatenate(rows)


def evaluate(target, drafter, held_out) -> dict:
    """Measures losses and acceptance on the held-out files."""
    models = [nnx.split(module) for module in (target, drafter)]

    @jax.jit
    def measure(tokens):
        logits = [train.text_logits(*split, tokens[:, :-1]) for split in models]
        losses = [train.next_token_loss(row, tokens).mean() for row in logits]
        return jnp.stack([*losses, ss.acceptance_rate(*logits).mean()])

    usable = len(held_out) // (LENGTH + 1) * (LENGTH + 1)
    rows = held_out[:usable].reshape(-1, LENGTH + 1).astype(np.int32)
    rows = rows[: len(rows) // EVALUATION_BATCH * EVALUATION_BATCH]
    losses = np.mean([measure(batch) for batch in rows.reshape(-1, EVALUATION_BATCH, LENGTH + 1)], axis=0)
    prompt = documents(held_out, NUM_CONTINUATIONS, CONTINUED_FROM, SEED)
    text = ss.generate(
        jax.random.key(SEED),
        prompt,
        target=from_nnx(target),
        draft=from_nnx(drafter),
        num_draft=4,
        max_new_tokens=CONTINUED_BY,
        eos_token=END,
    )
    drafted, accepted = (np.asarray(count, np.int64) for count in (text.stats.num_drafted, text.stats.num_accepted))
    # Position i is tested only where all earlier drafts were accepted.
    tried = np.concatenate([drafted[:1], accepted[:-1]])
    return {
        "held_out_loss": {"target": float(losses[0]), "drafter": float(losses[1])},
        "acceptance_rate_on_held_out_text": float(losses[2]),
        "continuations": {
            "what": f"{NUM_CONTINUATIONS} held-out documents continued from {CONTINUED_FROM} tokens by up to "
            f"{CONTINUED_BY}, temperature 1, K = 4, token rule",
            "acceptance": float(accepted.sum() / tried.sum()),
            "acceptance_by_position": accepted_by_position(drafted, accepted),
            "accepted_share_of_drafted": float(accepted.sum() / drafted.sum()),
            "tokens_a_step": float(1 + accepted.sum() / drafted[0]),
        },
    }


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), default=".work/pair")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--scale", default=1.0, help="Factor on the number of training steps.")
@click.option(
    "--target", "trained", type=click.Path(exists=True), help="A trained target: only the drafter is trained."
)
def main(data: Path, out: Path, scale: float, trained: str | None) -> None:
    began = time.perf_counter()
    train_stream, held_out = np.load(data / "train.npy"), np.load(data / "held_out.npy")
    tokens = jnp.asarray(train_stream, jnp.int32)
    target, drafter = (
        Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(SEED + i)) for i, config in enumerate((TARGET, DRAFTER))
    )
    sizes = {
        name: sum(x.size for x in jax.tree.leaves(nnx.state(module)))
        for name, module in (("target", target), ("drafter", drafter))
    }
    print(sizes, flush=True)
    if trained is None:
        steps = max(2, round(TARGET_STEPS * scale))
        keys = jax.random.split(jax.random.key(SEED + 1), steps)
        run("target", train.model_loss, target, windows(tokens, keys, BATCH), steps, 3e-3)
        save_checkpoint(out / "target", target)
    # The drafter learns from the weights as users load them, rounded to bfloat16.
    target = load_module(trained or out / "target", dtype=jnp.bfloat16)
    sampled = sample_text(from_nnx(target), train_stream, max(SAMPLED_AT_ONCE, round(SAMPLED_ROWS * scale)), SEED + 2)
    print(f"sampled {sampled.shape} {time.perf_counter() - began:.1f} s", flush=True)
    for i, (name, full) in enumerate(DISTIL_STEPS.items()):
        steps = max(2, round(full * scale))
        divergence_fn = getattr(train, name)
        run(
            name,
            lambda graphdef, fn=divergence_fn: train.distillation_loss(graphdef, target, fn),
            drafter,
            half_sampled(tokens, sampled, steps, SEED + 3 + i),
            steps,
            (4e-3, 3e-3)[i],
        )
        save_checkpoint(out / "drafter", drafter)
    report = {
        "parameters": sizes,
        "seed": SEED,
        "corpus": {"train": {"tokens": len(train_stream)}, "held_out": {"tokens": len(held_out)}},
        "steps": {"target": TARGET_STEPS, **DISTIL_STEPS},
        "batch": {"target": [BATCH, LENGTH], "drafter": [DISTIL_BATCH, LENGTH]},
        "scale": scale,
        **evaluate(target, drafter, held_out),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + os.linesep)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
