"""Checkpoints in GGUF against the folders in Hugging Face's layout that they were converted from."""

import dataclasses
import importlib
import json
import os
import subprocess
from pathlib import Path

import fixture_files
import gguf_files
import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from specsamp_jax._gguf import read_gguf
from specsamp_jax.models import load_checkpoint, load_generation_config, load_module
from specsamp_jax.models.checkpoints import gguf_config
from specsamp_jax.models.checkpoints.gguf_tensors import read_tensors
from specsamp_jax.models.rotary import Llama3Scaling, YarnScaling

gguf = pytest.importorskip("gguf")

FIXTURES = fixture_files.FIXTURES / "decoders"
PEERS_PYTHON = Path(__file__).parents[3] / ".venv-peers" / "bin" / "python"
LLAMA = {
    "general.architecture": "llama",
    "llama.context_length": 131072,
    "llama.embedding_length": 256,
    "llama.block_count": 1,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.rope.freq_base": 500000.0,
}
EMBEDDING = {"token_embd.weight": np.zeros((3, 256), np.float32)}


def config_of(path, settings, tensors=EMBEDDING):
    return gguf_config.read_config(read_gguf(gguf_files.write(path / "model.gguf", settings, tensors)))


def refuses(path, sentence, settings, tensors=EMBEDDING):
    with pytest.raises(ValueError, match=sentence) as error:
        config_of(path, settings, tensors)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "llama_linear", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"])
def test_parameters_and_config(name, tmp_path):
    expected = load_module(FIXTURES / name)
    module = load_module(gguf_files.convert(FIXTURES / name, tmp_path / "model.gguf"))
    # The format has no such setting: the scores are scaled by the size of a head.
    config, ours = expected.config, module.config
    known = {"head_dim": config.head_size, "query_pre_attn_scalar": ours.query_pre_attn_scalar}
    known |= {"layer_types": ours.layer_types} if ours.windows == config.windows else {}
    known |= {"rms_norm_eps": ours.rms_norm_eps}
    assert ours == dataclasses.replace(config, **known)
    assert ours.rms_norm_eps == pytest.approx(config.rms_norm_eps)
    if name == "gemma3":
        assert ours.layer_types == config.layer_types
    states = nnx.to_pure_dict(nnx.state(module)), nnx.to_pure_dict(nnx.state(expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=3e-7), *states)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_quantized_weights(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config |= {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    # Those of the Qwen2, whose rows are of 32 values, but its biases.
    tensors = safetensors.numpy.load_file(FIXTURES / "qwen2" / "model.safetensors")
    weights = {name: values for name, values in tensors.items() if not name.endswith("bias")}
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    expected = {}

    def quantized(name, values):
        if values.ndim == 1:
            return values
        blocks = importlib.import_module("gguf.quants").quantize(values, kind)
        expected[name] = gguf.dequantize(blocks, kind)
        return values.shape, int(kind), blocks.tobytes()

    path = gguf_files.convert(tmp_path, tmp_path / "model.gguf", quantized)
    assert load_module(path).dtype == {"F16": "float16"}.get(kind.name, "bfloat16")
    module = load_module(path, dtype="float32")
    # Query rows of a head in the file: the first of each half, the second of each half, and so on.
    halves = expected["blk.1.attn_q.weight"].reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    np.testing.assert_array_equal(module.blocks[1].attention.qkv.kernel[:, :32], halves.T)
    np.testing.assert_array_equal(module.blocks[0].mlp.down.kernel[...], expected["blk.0.ffn_down.weight"].T)
    np.testing.assert_array_equal(module.vocabulary.embedding[...], expected["token_embd.weight"])


def test_rope_factors_of_llama3(tmp_path):
    frequencies = 500000.0 ** (-np.arange(64) / 64)
    factors = frequencies / Llama3Scaling(32.0, 1.0, 4.0, 8192)(frequencies)
    config = config_of(tmp_path, LLAMA, EMBEDDING | {"rope_freqs.weight": factors.astype("f")})
    assert config["rope_scaling"] == Llama3Scaling(32.0, 1.0, 4.0, 8192).to_dict()
    assert "rope_scaling" not in config_of(tmp_path, LLAMA, EMBEDDING | {"rope_freqs.weight": np.ones(64, "f")})
    for other in (factors + 0.1, np.full(64, np.nan), np.ones((2, 32))):
        tensors = EMBEDDING | {"rope_freqs.weight": other.astype("f")}
        refuses(tmp_path, "rope_freqs.weight in .* must hold the divisors of Llama 3's rope scaling", LLAMA, tensors)


def test_rope_scaling(tmp_path):
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    yarn["llama.rope.scaling.original_context_length"] = 32768
    scaling = config_of(tmp_path, LLAMA | yarn)["rope_scaling"]
    assert scaling.pop("rope_type") == "yarn"
    assert YarnScaling(**scaling) == YarnScaling(4.0, 32768)
    refuses(
        tmp_path, r"holds llama.rope.scaling.attn_factor = 1.5, which", LLAMA | {"llama.rope.scaling.attn_factor": 1.5}
    )


def test_end_tokens(tmp_path):
    tokens = {"tokenizer.ggml.tokens": ["a", "<|im_end|>", "<end_of_turn>"], "tokenizer.ggml.eos_token_id": 0}
    tokens["tokenizer.ggml.token_type"] = np.array([1, 3, 1], np.int32)
    path = gguf_files.write(tmp_path / "model.gguf", LLAMA | tokens, EMBEDDING)
    assert load_generation_config(path).eos_token == (0, 1)
    assert load_generation_config(path, ignore=["eos_token_id"]).eos_token == ()
    gguf_files.write(path, LLAMA | tokens | {"tokenizer.ggml.eos_token_id": 77}, EMBEDDING)
    with pytest.raises(ValueError, match=r"eos_token_id in .*model.gguf must be a token"):
        load_generation_config(path)


def test_the_largest_gemmas_scale_scores_by_another_size(tmp_path):
    settings = {key.replace("llama", "gemma3"): value for key, value in LLAMA.items()}
    settings |= {"general.architecture": "gemma3", "gemma3.attention.key_length": 64}
    assert config_of(tmp_path, settings)["query_pre_attn_scalar"] == 64
    assert config_of(tmp_path, settings | {"gemma3.block_count": 62})["query_pre_attn_scalar"] == 128
    pattern = "gemma3.attention.sliding_window_pattern"
    assert "layer_types" not in config_of(tmp_path, settings | {pattern: 6})
    refuses(tmp_path, f"{pattern} in .* must be 6 or a list of booleans, got 4", settings | {pattern: 4})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"general.architecture": "mamba"}, "general.architecture must be one of 'llama', .* got 'mamba' and None in"),
        ({"general.type": "adapter"}, "got 'llama' and 'adapter' in"),
        ({"llama.block_count": None}, "must hold llama.block_count, which is missing"),
        ({"llama.embedding_length": "x"}, "llama.embedding_length in .* must be a whole number from 1 to .*, got 'x'"),
        ({"llama.feed_forward_length": np.ones(2, np.int32)}, "feed_forward_length in .* must be a whole number"),
        ({"llama.expert_count": 8}, "holds llama.expert_count = 8, which is not known here and might change"),
        ({"llama.rope.dimension_count": 64}, "rope.dimension_count in .* must be 128, as the size of a key, got 64"),
        ({"llama.attention.sliding_window": 4096}, "states a sliding window of 4096 tokens, .* for 'llama'"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon in .* must be a number of at least 0"),
    ],
)  # fmt: skip
def test_what_is_not_supported(changes, sentence, tmp_path):
    settings = {key: value for key, value in (LLAMA | changes).items() if value is not None}
    refuses(tmp_path, sentence, settings)
    refuses(tmp_path, "must hold the matrix token_embd.weight", LLAMA, {})


@pytest.mark.parametrize(
    ("tensor", "sentence"),
    [
        (
            ((48, 24), 9, b""),
            "q.weight in .* is of the quantization type number 9, which the installed package gguf can",
        ),
        (((48, 24), 4000, b""), "is of the quantization type number 4000"),
        (((48, 24), 8, b""), "must have rows of a multiple of 32 values, for its type is Q8_0, got 24"),
        (((48, 2**40), 8, b""), "is cut off: blk.0.attn_q.weight ends at byte .*, and the file has"),
        (((47, 24), 0, bytes(47 * 24 * 4)), "must have a number of rows that 2 x 4 heads divide, got 47"),
        (((16, 24), 0, bytes(16 * 24 * 4)), r"q_proj.weight must have shape \(32, 24\) by the config, got \(16, 24\)"),
    ],
)
def test_tensors_that_cannot_be_loaded(tensor, sentence, tmp_path):
    def changed(name, values):
        return tensor if name == "blk.0.attn_q.weight" else values

    path = gguf_files.convert(FIXTURES / "llama", tmp_path / "model.gguf", changed)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(path)


def test_a_tensor_that_the_model_does_not_have_is_named(tmp_path):
    settings = LLAMA | {"llama.block_count": 2**31 - 1}
    path = gguf_files.write(tmp_path / "model.gguf", settings, EMBEDDING | {"blk.0.ssm_a.weight": np.ones(3, "f")})
    assert list(read_tensors(read_gguf(path), gguf_config.read_config(read_gguf(path))))[1] == "blk.0.ssm_a.weight"
    with pytest.raises(
        ValueError, match=r"num_hidden_layers in .*model.gguf is 2147483647, but the weights have tensor"
    ):
        load_module(path)


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    path = gguf_files.convert(FIXTURES / "llama", tmp_path / "model.gguf")
    monkeypatch.setitem(importlib.import_module("sys").modules, "gguf.quants", None)
    importlib.import_module("specsamp_jax.models.checkpoints.gguf_tensors")._quantization.cache_clear()
    with pytest.raises(ValueError, match=r"package gguf, which is not installed: install specsamp\[gguf\]"):
        load_module(path)


TRANSFORMERS = """
import sys, numpy, torch, transformers
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(sys.argv[1], gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager")
tokens = torch.from_numpy(numpy.load(sys.argv[1] + "/tokens.npy")).long()
with torch.no_grad():
    numpy.save(sys.argv[1] + "/logits.npy", model.eval()(tokens).logits.numpy())
"""


@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason="needs the environment that bench/peers/make_env.sh makes")
@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])  # others have settings that its GGUF loading does not read
def test_transformers_reads_the_same_from_our_files(name, tmp_path):
    if subprocess.run([PEERS_PYTHON, "-c", "import accelerate, gguf"], capture_output=True).returncode:
        pytest.skip("transformers needs the packages accelerate and gguf")
    made = fixture_files.arrays(f"decoders/{name}/expected.npz")
    tokens = {
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(61)],
        "tokenizer.ggml.model": "gpt2",
        "general.name": "m",
    }
    head_dim = {"rope.dimension_count": 8, "vocab_size": 61}
    kind = name.removesuffix("_tied")
    gguf_files.convert(
        FIXTURES / name,
        tmp_path / "model.gguf",
        **tokens,
        **{f"{kind}.{key}": value for key, value in head_dim.items()},
    )
    np.save(tmp_path / "tokens.npy", made["tokens"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([PEERS_PYTHON, "-c", TRANSFORMERS, tmp_path], check=True, env=environment)
    fixture_files.assert_near(np.load(tmp_path / "logits.npy"), made["logits"])
