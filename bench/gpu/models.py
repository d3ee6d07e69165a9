"""Time of a decoding step at real shapes with random weights, and the share of it that verification takes.

    python bench/gpu/models.py OUT.json OUT.md SECONDS
    python bench/gpu/models.py OUT.json OUT.md SECONDS Qwen      # pairs with such a word in their name
    VARIANTS="kernel|xla" python bench/gpu/models.py ...         # verifications of these names alone
    python bench/gpu/models.py OUT.json OUT.md SECONDS --tiny    # small models, to try out the script on any machine

Logits of both models are independent and nearly flat, so that p and q overlap as those of trained pairs do. A step's
time is the host's clock over many steps in a row, divided by their number; a verification's is the device time of its
kernels (CUPTI), on logits of the step's shape and type, rotated past the L2.
"""

import dataclasses
import functools
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import paper
import results
import timings
from flax import nnx

import specsamp_jax as ss
from specsamp_jax import models
from specsamp_jax._types import Uniforms
from specsamp_jax.models.whisper.model import decoder_model, encode

NUM_DRAFT, PROMPT_LENGTH, NUM_STEPS = 4, 128, 24
BATCH_SIZES = 1, 8, 64
LOGIT_STDDEV = 0.6
"""Standard deviation of each model's logits; sum min(p, q) is then .7."""


def sizes(names: str, *values: int) -> dict[str, Any]:
    """Keyword arguments of a config."""
    return dict(zip(names.split(), values, strict=True))


DECODER = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
WHISPER = (
    "encoder_layers encoder_attention_heads encoder_ffn_dim decoder_layers decoder_attention_heads decoder_ffn_dim"
)
SMALL_EN = {"vocab_size": 51_864, "d_model": 768}
PAIRS: dict[str, tuple[Any, Any]] = {
    "Llama 2 7B, Sheared-LLaMA 1.3B": (
        models.LlamaConfig(**sizes(DECODER, 32_000, 4096, 11_008, 32, 32, 32)),
        models.LlamaConfig(**sizes(DECODER, 32_000, 2048, 5504, 24, 16, 16)),
    ),
    "Qwen2.5 7B, 0.5B": (
        models.Qwen2Config(**sizes(DECODER, 152_064, 3584, 18_944, 28, 28, 4), rope_theta=1e6),
        models.Qwen2Config(**sizes(DECODER, 151_936, 896, 4864, 24, 14, 2), rope_theta=1e6, tie_word_embeddings=True),
    ),
    "Whisper small.en, distilled": (
        models.WhisperConfig(**SMALL_EN, **sizes(WHISPER, 12, 12, 3072, 12, 12, 3072)),
        models.WhisperConfig(**SMALL_EN, **sizes(WHISPER, 12, 12, 3072, 4, 12, 3072)),
    ),
}
MODULES = {models.LlamaConfig: models.Llama, models.Qwen2Config: models.Qwen2, models.WhisperConfig: models.Whisper}


def tiny(config: Any) -> Any:
    """A config with small matrices and few layers, to try out the script."""
    names = [f.name for f in dataclasses.fields(config)]
    changes = {name: 1 for name in names if name.endswith("layers")}
    changes |= {name: 64 for name in names if name in ("hidden_size", "d_model") or "ffn" in name or "intermed" in name}
    changes |= {name: 2 for name in names if name.endswith("heads")}
    return dataclasses.replace(config, **changes)


def baseline(key, target_logits, draft, sampling=None, *, implementation=None):
    """`paper.baseline` with the signature of `verify`."""
    del sampling, implementation
    batch_size, num_rows, _ = target_logits.shape
    keys = jax.random.split(key if key.ndim == 0 else key[0])
    uniforms = Uniforms(
        jax.random.uniform(keys[0], (batch_size, num_rows - 1)), jax.random.uniform(keys[1], (batch_size, 2))
    )
    tokens, num_accepted = paper.baseline(target_logits, None, draft, None, uniforms)
    numbers = jnp.zeros(tokens.shape)
    return ss.Verification(tokens, num_accepted, numbers, numbers[:, 1:], jnp.zeros(num_accepted.shape, jnp.int32))


FILTERS = ss.SamplingParams(temperature=0.7, top_k=20, top_p=0.8)
"""The parameters of Qwen2.5's generation_config.json."""

PLAIN = ss.SamplingParams()
KERNEL, BLOCK_KERNEL = (functools.partial(fn, implementation="pallas") for fn in (ss.verify, ss.verify_block))
VERIFY_FNS = {
    "kernel": (KERNEL, PLAIN),
    "kernel, T .7, top-k 20, top-p .8": (KERNEL, FILTERS),
    "block rule's kernel": (BLOCK_KERNEL, PLAIN),
    "block rule's kernel, T .7, top-k 20, top-p .8": (BLOCK_KERNEL, FILTERS),
    "xla": (functools.partial(ss.verify, implementation="xla"), PLAIN),
    "paper's baseline": (baseline, PLAIN),
}
"""Functions that verify, and the sampling parameters of both models."""

if "VARIANTS" in os.environ:
    VERIFY_FNS = {name: VERIFY_FNS[name] for name in os.environ["VARIANTS"].split("|")}
if jax.default_backend() != "gpu":
    VERIFY_FNS = {name: value for name, value in VERIFY_FNS.items() if "kernel" not in name}


def flatten_logits(module: Any) -> None:
    """Scales the head to set the scale of the logits, because features after the last norm have size 1."""
    decoder = getattr(module, "decoder", module)
    head = decoder.vocabulary.head
    width = module.config.d_model if hasattr(module.config, "d_model") else module.config.hidden_size
    value = LOGIT_STDDEV / width**0.5 * jax.random.normal(jax.random.key(width), head.shape, jnp.float32)
    head.set_value(value.astype(head.dtype))


def make_modules(configs: tuple[Any, Any]) -> list[Any]:
    """Random modules in bfloat16."""
    made = []
    for seed, config in enumerate(configs):
        fn = MODULES[type(config)]
        made.append(fn(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(seed)))
        flatten_logits(made[-1])
    return made


def make_models(modules: list[Any], batch_size: int) -> tuple[ss.Model, ss.Model]:
    """Target and drafter; Whisper's decoders share encoder states of `batch_size` random utterances."""
    target, draft = modules
    if isinstance(target, models.Whisper):
        shape = batch_size, target.config.num_mel_bins, target.config.num_frames
        states = encode(target, jax.random.normal(jax.random.key(0), shape, jnp.bfloat16))
        return decoder_model(target, states), decoder_model(draft, states)
    target, draft = map(models.from_nnx, modules)
    return target, models.with_vocab_size(draft, models.vocab_size(target))


def step(key, state, target, draft, *, verify_fn, sampling):
    """One step, without an end token."""
    return ss.step(key, state, target=target, draft=draft, num_draft=NUM_DRAFT, verify_fn=verify_fn, sampling=sampling)


def measure_steps(program, state, pair) -> dict[str, float]:
    """Milliseconds per step, and tokens per step."""
    keys = list(jax.random.split(jax.random.key(1), NUM_STEPS + 1))
    state, _ = program(keys.pop(), state, *pair)
    jax.block_until_ready(state)
    begun, infos = time.perf_counter(), []
    for key in keys:
        state, info = program(key, state, *pair)
        infos.append(info.num_tokens)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begun
    return {"step_ms": 1e3 * seconds / NUM_STEPS, "tokens_a_step": float(jnp.stack(infos).mean())}


def verification_inputs(vocab_size: int, batch_size: int, sampling: ss.SamplingParams) -> tuple[Any, int]:
    """A function from a seed to inputs of a verification as in a step, and how many exceed the L2.

    Logits are float32, all four tokens are drafted, and normalizers are handed over.
    """

    @jax.jit
    def make(seed):
        keys = jax.random.split(jax.random.key(seed), 4)
        shape = batch_size, NUM_DRAFT + 1, vocab_size
        target, logits = (LOGIT_STDDEV * jax.random.normal(k, shape) for k in keys[:2])
        logits = logits[:, 1:]
        drafted = [ss.sample(jax.random.fold_in(keys[2], i), logits[:, i], sampling) for i in range(NUM_DRAFT)]
        tokens, normalizers = (jnp.stack(part, axis=1) for part in zip(*drafted, strict=True))
        return jax.random.split(keys[3], batch_size), target, ss.Draft(tokens, logits, None, normalizers)

    return make, timings.num_sets(4 * batch_size * (2 * NUM_DRAFT + 1) * vocab_size)


def compare(name: str, modules: list[Any], batch_size: int) -> Iterator[dict[str, Any]]:
    """Measures one pair at one batch size; yields a row for each of `VERIFY_FNS`."""
    pair = make_models(modules, batch_size)
    prompt_length = 4 if isinstance(modules[0], models.Whisper) else PROMPT_LENGTH
    prompt = jax.random.randint(jax.random.key(2), (batch_size, prompt_length), 0, 1000)
    max_new_tokens = (NUM_STEPS + 1) * (NUM_DRAFT + 1)

    def init():
        return ss.init(prompt, target=pair[0], draft=pair[1], num_draft=NUM_DRAFT, max_new_tokens=max_new_tokens)

    state, measure = init(), timings.measure if jax.default_backend() == "gpu" else timings.measure_host
    for which, (fn, sampling) in VERIFY_FNS.items():
        whole = functools.partial(step, verify_fn=fn, sampling=sampling)
        whole = jax.jit(whole, donate_argnums=1).lower(jax.random.key(0), state, *pair).compile()
        make, num_sets = verification_inputs(modules[0].config.vocab_size, batch_size, sampling)

        def verification(key, target, draft, fn=fn, sampling=sampling):
            # As in a step, the parameters are numbers, not arguments of the program.
            return fn(key, target, draft._replace(sampling=sampling), sampling)

        alone = jax.jit(verification).lower(*jax.eval_shape(make, 0)).compile()
        with timings.alone_on_the_gpu():
            row = {"pair": name, "B": batch_size, "verification": which}
            row |= measure_steps(whole, init(), pair)
            sets = [make(seed) for seed in range(num_sets)]
            measured = measure(alone, sets, max(2, 24 // num_sets))
        us = row["verification_us"] = measured["us"]
        yield row | {"launches": measured.get("launches"), "share": us / 1e3 / row["step_ms"]}


def table(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        f"# A step at real shapes: {about['device']}, JAX {about['jax']}",
        "",
        f"Random bfloat16 weights, float32 logits, K = {NUM_DRAFT}, temperature 1, prompts of {PROMPT_LENGTH} tokens,",
        f"4 of Whisper's; {NUM_STEPS} steps. Step: the host's clock over steps in a row. Verification: device time of",
        "its kernels, normalizers handed over. Share: the one over the other.",
        "",
        "    " + about["command"],
        "",
    ]
    header = ["pair", "B", "tokens a step", "verification by", "step, ms", "verification, us", "launches", "share"]
    body = []
    for row in rows:
        cells = [row["pair"], row["B"], f"{row['tokens_a_step']:.2f}", row["verification"], f"{row['step_ms']:.2f}"]
        cells += [f"{row['verification_us']:.1f}", row["launches"] or "", f"{100 * row['share']:.1f} %"]
        body.append(cells)
    return "\n".join([*lines, *results.table(header, body, left=(0, 3))]) + "\n"


def main() -> None:
    """Writes the results after each batch size, and stops when the time is up."""
    out, page, seconds, *rest = sys.argv[1:]
    deadline, is_tiny = time.time() + float(seconds), "--tiny" in rest
    words = [word for word in rest if word != "--tiny"]
    about: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about["command"] = "bench/gpu_models.sh" + " (tiny: a rehearsal, no result)" * is_tiny
    rows = []
    for name, configs in PAIRS.items():
        if words and not any(word in name for word in words):
            continue
        modules = make_modules(tuple(map(tiny, configs)) if is_tiny else configs)
        for batch_size in BATCH_SIZES[: 2 if is_tiny else None]:
            if time.time() > deadline:
                print("out of time before", name, batch_size)
                return
            for row in compare(name, modules, batch_size):
                rows.append(row)
                results.write(out, about, rows)
                pathlib.Path(page).write_text(table(about, rows))
                print(row, flush=True)
        del modules


if __name__ == "__main__":
    main()
