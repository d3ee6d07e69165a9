"""Decoders against the transformers library, on checkpoints that it wrote (tests/fixtures/make_decoder_fixtures.py).

Logits within 1e-4 of the largest in float32, read at once, token by token, and several at each row's own position;
greedy text token by token, with speculation and without.
"""

import dataclasses
import functools
import os
import subprocess
from pathlib import Path

import fixture_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from fixture_files import assert_near
from flax import nnx
from inputs import quick_jit
from small_llama import SIZES, make_llama

import specsamp_jax as ss
from specsamp_jax.models import from_nnx, load_checkpoint, load_module, save_checkpoint
from specsamp_jax.models.rotary import YarnScaling

pytestmark = pytest.mark.optimised(False)

ROOT = Path(__file__).parents[2]
FIXTURES = fixture_files.FIXTURES / "decoders"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"  # made by bench/peers/make_env.sh
NAMES = [
    *("llama", "llama_tied", "llama_linear", "llama3", "mistral"),
    *("qwen2", "qwen2_yarn", "qwen3", "gemma", "gemma2", "gemma3"),
]

TRANSFORMERS = """
import sys, numpy, torch, transformers
folder = sys.argv[1]
load = transformers.AutoModelForCausalLM.from_pretrained
model, info = load(folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
assert not any(info.values()), info
tokens = torch.from_numpy(numpy.load(folder + "/tokens.npy")).long()
with torch.no_grad():
    numpy.save(folder + "/logits.npy", model.eval()(tokens).logits.numpy())
"""


def expected(name):
    return fixture_files.arrays(f"decoders/{name}/expected.npz")


@functools.cache
def loaded(name):
    return load_checkpoint(FIXTURES / name)


@quick_jit
def apply(model, tokens, positions, cache):
    return model.apply_fn(model.params, tokens, positions, cache)


def all_logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    # With the cache of the tests of drafts, so that both run one program.
    return apply(model, tokens, positions, model.init_cache_fn(len(tokens), 30))[0]


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_a_whole_text(name):
    made = expected(name)
    assert_near(all_logits(loaded(name), made["tokens"]), made["logits"])


@pytest.mark.parametrize("name", NAMES)
def test_logits_one_token_at_a_time(name):
    made, model = expected(name), loaded(name)
    cache = model.init_cache_fn(made["tokens"].shape[0], 30)
    for t in range(made["tokens"].shape[1]):
        positions = jnp.full((3, 1), t)
        logits, cache = apply(model, made["tokens"][:, t : t + 1], positions, cache)
        assert_near(logits[:, 0], made["logits"][:, t])


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_drafts_at_each_rows_own_position_after_rejected_ones(name):
    made, model = expected(name), loaded(name)
    tokens, lengths, num = made["tokens"], np.array([2, 17, 11]), 5
    # A prompt of each length, with other tokens behind it, as rejected drafts and padding leave them.
    prompt = np.where(np.arange(24) < lengths[:, None], tokens, (tokens + 7) % 61)
    positions = jnp.broadcast_to(jnp.arange(24), prompt.shape)
    _, cache = apply(model, prompt, positions, model.init_cache_fn(3, 30))
    positions = lengths[:, None] + np.arange(num)
    logits, _ = apply(model, np.take_along_axis(tokens, positions, 1), jnp.asarray(positions), cache)
    assert_near(logits, np.take_along_axis(made["logits"], positions[..., None], 1))


@pytest.mark.parametrize(
    ("name", "drafter"),
    [("llama", "first layer")]
    # On a push, the logits of these families are compared, after rejected drafts too.
    + [
        pytest.param(name, "first layer", marks=pytest.mark.slow)
        for name in ("llama3", "qwen2", "qwen2_yarn", "qwen3", "gemma", "gemma2", "gemma3")
    ]
    + [pytest.param("gemma2", "nobody", marks=pytest.mark.slow)],
)
def test_greedy_text(name, drafter):
    made, target = expected(name), loaded(name)
    options = {"num_draft": 4, "max_new_tokens": 64, "sampling": ss.SamplingParams(temperature=0.0)}

    @quick_jit
    def generate(prompt, target, draft):
        return ss.generate(jax.random.key(0), prompt, target=target, draft=draft, **options)

    draft = None if drafter == "nobody" else first_layer(name)
    result = generate(made["text"][:, : made["prompt_length"]], target, draft)
    assert result.tokens.tolist() == made["text"].tolist()


def first_layer(name):
    """A smaller model: the first layers of the target."""
    module = load_module(FIXTURES / name)
    changes = {"num_hidden_layers": 1}
    if module.config.layer_types is not None:
        changes["layer_types"] = module.config.layer_types[:1]
    smaller = type(module)(dataclasses.replace(module.config, **changes), rngs=nnx.Rngs(0))
    module.blocks = nnx.List([module.blocks[0]])
    nnx.update(smaller, nnx.state(module))
    return from_nnx(smaller)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama_linear", {"rope_scaling": None}),
        ("llama3", {"rope_scaling": None}),
        ("qwen2_yarn", {"rope_scaling": None}),
        ("qwen2_yarn", {"rope_scaling": YarnScaling(4.0, 16, 2.0, 0.5, attention_factor=1.0)}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 12}),
        ("gemma2", {"sliding_window": 8}),
        ("gemma2", {"layer_types": ("full_attention", "sliding_attention", "full_attention")}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 8}),
        ("gemma3", {"rope_local_base_freq": 500.0}),
        ("gemma3", {"rope_local_base_freq": None}),
        ("gemma3", {"rope_scaling": None}),
        ("gemma3", {"layer_types": ("full_attention", "sliding_attention", "full_attention")}),
    ],
)
def test_each_setting_changes_the_logits_by_more_than_the_tolerance(name, changes):
    module, made = load_module(FIXTURES / name), expected(name)
    other = type(module)(dataclasses.replace(module.config, **changes), rngs=nnx.Rngs(0))
    nnx.update(other, nnx.state(module))
    assert np.abs(all_logits(from_nnx(other), made["tokens"]) - made["logits"]).max() > 0.01


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 0.06), ("float16", 0.008)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma2"])
def test_half_precision(name, dtype, rtol, tmp_path):
    # 2^-8 and 2^-11 a rounding, of which a token's way through 2 or 3 layers has some dozens: 15 of them at once.
    made = expected(name)
    tensors = safetensors.numpy.load_file(FIXTURES / name / "model.safetensors")
    half = {key: np.asarray(value, jnp.dtype(dtype)) for key, value in tensors.items()}
    safetensors.numpy.save_file(half, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((FIXTURES / name / "config.json").read_text())
    model = load_checkpoint(tmp_path)
    assert {x.dtype for x in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    assert {x.dtype for x in jax.tree.leaves(model.init_cache_fn(1, 1))} == {jnp.dtype(dtype)}
    assert_near(all_logits(model, made["tokens"]), made["logits"], rtol)


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the environment that bench/peers/make_env.sh makes")
@pytest.mark.parametrize("name", ["tied", "bfloat16", *NAMES[2:]])
def test_transformers_loads_our_checkpoint(name, tmp_path):
    module = load_module(FIXTURES / name) if name in NAMES else make_llama(tie_word_embeddings=name == "tied")
    save_checkpoint(tmp_path, module, dtype=jnp.bfloat16 if name == "bfloat16" else jnp.float32)
    tokens = np.random.default_rng(0).integers(SIZES["vocab_size"], size=(2, 19)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    subprocess.run([PEERS_PYTHON, "-c", TRANSFORMERS, tmp_path], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert_near(all_logits(load_checkpoint(tmp_path, dtype=jnp.float32), tokens), np.load(tmp_path / "logits.npy"))
