import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small_llama import SIZES, make_llama

from specsamp_jax.models import from_nnx, load_checkpoint, load_module, save_checkpoint


def leaves(module):
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(module)))


def test_round_trip_in_float32_is_exact(llama, tmp_path):
    save_checkpoint(tmp_path / "a" / "b", llama, dtype=jnp.float32)
    again = load_module(tmp_path / "a" / "b")
    assert again.config == llama.config
    for x, y in zip(leaves(llama), leaves(again), strict=True):
        assert y.dtype == jnp.float32
        np.testing.assert_array_equal(x, y)


def test_round_trip_in_bfloat16_rounds_once(llama, tmp_path):
    save_checkpoint(tmp_path, llama)
    for x, y in zip(leaves(llama), leaves(load_module(tmp_path)), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16).astype(jnp.float32), y)
    half = load_module(tmp_path, dtype=jnp.bfloat16)
    assert {half.dtype, *(x.dtype for x in leaves(half))} == {jnp.dtype("bfloat16")}


def test_a_loaded_model_is_the_adapted_module(llama, tmp_path):
    save_checkpoint(tmp_path, llama, dtype=jnp.float32)
    model, expected = load_checkpoint(tmp_path), from_nnx(llama)
    assert model.apply_fn == expected.apply_fn
    assert model.init_cache_fn == expected.init_cache_fn
    tokens, positions = jnp.array([[3, 1, 4]]), jnp.array([[0, 1, 2]])
    np.testing.assert_array_equal(
        model.apply_fn(model.params, tokens, positions, model.init_cache_fn(1, 4))[0],
        expected.apply_fn(expected.params, tokens, positions, expected.init_cache_fn(1, 4))[0],
    )


def test_saving_replaces_what_was_there(tmp_path):
    save_checkpoint(tmp_path, make_llama(seed=1, num_hidden_layers=3))
    save_checkpoint(tmp_path, make_llama(seed=2), dtype=jnp.float32)
    for x, y in zip(leaves(make_llama(seed=2)), leaves(load_module(tmp_path)), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def saved(tmp_path):
    save_checkpoint(tmp_path, make_llama())
    return tmp_path


def refuses(folder, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_checkpoint(folder)


def change_tensors(folder, change):
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


def test_missing_tensor(saved):
    change_tensors(saved, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.weight"))
    refuses(saved, "must hold the tensor model.layers.1.self_attn.k_proj.weight, which is missing.")


def test_superfluous_tensor(saved):
    change_tensors(saved, lambda tensors: tensors.update({"model.layers.2.mlp.up_proj.weight": np.zeros(3)}))
    refuses(saved, "holds the tensor model.layers.2.mlp.up_proj.weight, which this model does not have.")


def test_misshapen_tensor(saved):
    change_tensors(saved, lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": np.zeros((24, 40))}))
    refuses(saved, "model.layers.0.mlp.up_proj.weight must have shape (40, 24) by the config, got (24, 40)")


def test_tensor_of_integers(saved):
    change_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": np.zeros(24, np.int8)}))
    refuses(saved, "model.norm.weight must be floating point, got I8")


@pytest.mark.parametrize("keep", [0, 5, 500, -1])
def test_truncated_tensors(saved, keep):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refuses(saved, f"{file} is no whole safetensors file: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    refuses(saved, f"A checkpoint must hold {name}, but there is no {saved / name}.")


@pytest.mark.parametrize("text", ["{", "", "[1]", "\udc80"])
def test_broken_config(saved, text):
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(saved, f"{saved / 'config.json'} must be a JSON object")


def test_other_architecture(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "mamba"}))
    refuses(saved, "model_type must be one of 'llama', 'whisper', got 'mamba'")


def test_other_sizes_name_a_tensor(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": SIZES["vocab_size"] + 1}))
    refuses(saved, "model.embed_tokens.weight must have shape (32, 24) by the config, got (31, 24)")
