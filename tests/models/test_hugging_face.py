"""The same weights give the same logits in the transformers library, float32, within 1e-4 of the largest."""

import os
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from small_llama import SIZES, make_llama

from specsamp_jax.models import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "llama"
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"  # made by bench/peers/make_env.sh

TRANSFORMERS = """
import sys, numpy, torch, transformers
folder = sys.argv[1]
model, info = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
tokens = torch.from_numpy(numpy.load(folder + "/tokens.npy")).long()
with torch.no_grad():
    numpy.save(folder + "/logits.npy", model.eval()(tokens).logits.numpy())
"""


def our_logits(folder, tokens):
    model = load_checkpoint(folder)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logits, _ = model.apply_fn(model.params, jnp.asarray(tokens), positions, model.init_cache_fn(*tokens.shape))
    return logits


def assert_same(logits, expected):
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_their_checkpoint_with_us(name):
    with np.load(FIXTURES / name / "logits.npz") as made:
        assert_same(our_logits(FIXTURES / name, made["tokens"]), made["logits"])


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the environment that bench/peers/make_env.sh makes")
@pytest.mark.parametrize(("tied", "dtype"), [(False, jnp.float32), (True, jnp.bfloat16)])
def test_our_checkpoint_with_them(tied, dtype, tmp_path):
    save_checkpoint(tmp_path, make_llama(tie_word_embeddings=tied), dtype=dtype)
    tokens = np.random.default_rng(0).integers(SIZES["vocab_size"], size=(2, 19)).astype(np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    subprocess.run([PEERS_PYTHON, "-c", TRANSFORMERS, tmp_path], check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert_same(our_logits(tmp_path, tokens), np.load(tmp_path / "logits.npy"))
