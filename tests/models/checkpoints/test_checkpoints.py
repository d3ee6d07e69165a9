import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small_llama import SIZES, make_llama

from specsamp_jax.models import from_nnx, load_checkpoint, load_module, save_checkpoint
from specsamp_jax.models.checkpoints import slots
from specsamp_jax.models.checkpoints.folder import begin_all, open_checkpoint
from specsamp_jax.models.checkpoints.tensors import Stored

pytestmark = pytest.mark.optimised(False)


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
    for x, y in zip(leaves(llama), leaves(load_module(tmp_path, dtype=jnp.float32)), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16).astype(jnp.float32), y)
    half = load_module(tmp_path)
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


def test_unexpected_tensor(saved):
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
    refuses(saved, f"{file} is not a complete safetensors file: ")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    refuses(saved, f"A checkpoint must hold {name}, but there is no {saved / name}.")


@pytest.mark.parametrize("text", ["{", "", "[1]", "\udc80"])
def test_broken_config(saved, text):
    (saved / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refuses(saved, f"{saved / 'config.json'} must be a JSON object")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": ["llama"]}, "model_type in {} must be text, got ['llama']."),
        ({"model_type": None}, "model_type must be one of 'llama'"),
        ({"layer_types": [{}]}, "layer_types in {} must be a list of texts, got [{{}}]."),
        ({"layer_types": "full_attention"}, "layer_types in {} must be a list of texts, got 'full_attention'."),
        ({"rope_scaling": "linear"}, "rope_scaling in {} must be a JSON object, got 'linear'."),
        ({"rope_scaling": {"rope_type": ["linear"]}}, "rope_type in {} must be text, got ['linear']."),
        ({"rope_parameters": {"type": {}}}, "type in {} must be text, got {{}}."),
        ({"rope_theta": 10**400}, "rope_theta in {} must be a number of at most 2**53 in size, got 1000"),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, "factor in {} must be a number of at most 2**53"),
        ({"rms_norm_eps": float("inf")}, "it holds Infinity, which is no number in JSON"),
        ({"num_hidden_layers": 10**5}, "num_hidden_layers in {} is 100000, but the weights have tensors of 2 layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers in {} is 1000000000000, but the weights have"),
        ({"num_attention_heads": 0}, "{}: num_attention_heads must be above 0, got 0."),
        ({"num_hidden_layers": 3}, "num_hidden_layers in {} is 3, but the weights have tensors of 2 layers"),
    ],
)
def test_config_of_wrong_types_and_sizes(saved, change, sentence):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refuses(saved, sentence.format(file))


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim"])
@pytest.mark.parametrize("value", [2 * 10**9, 2**53])
def test_config_of_huge_sizes(saved, name, value):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), name: value}))
    with pytest.raises(ValueError, match=r"by the config|is not supported|num_key_value_heads must"):
        load_checkpoint(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_only_regular_files_are_opened(saved, name):
    (saved / name).unlink()
    (saved / name).mkdir()
    refuses(saved, f"{saved / name} must be a regular file, got a directory.")
    (saved / name).rmdir()
    os.mkfifo(saved / name)
    refuses(saved, f"{saved / name} must be a regular file, got a FIFO.")
    (saved / name).unlink()
    (saved / name).symlink_to("/dev/zero")
    refuses(saved, f"{saved / name} must be a regular file, got a device.")


def test_other_architecture(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": "mamba"}))
    refuses(
        saved,
        "model_type must be one of 'llama', 'mistral', 'qwen2', 'qwen3', 'gemma', 'gemma2', 'gemma3_text', 'whisper', "
        "got 'mamba'",
    )


def test_other_sizes_name_a_tensor(saved):
    file = saved / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": SIZES["vocab_size"] + 1}))
    refuses(saved, "model.embed_tokens.weight must have shape (32, 24) by the config, got (31, 24)")


def test_tensors_that_are_computed_from_others_are_allowed(tmp_path):
    module = make_llama(tie_word_embeddings=True)
    save_checkpoint(tmp_path, module, dtype=jnp.float32)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4), "lm_head.weight": np.zeros((31, 24))}
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    for x, y in zip(leaves(module), leaves(load_module(tmp_path)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_parameter_keeps_its_type_and_most_of_them_say_what_is_computed(saved):
    name = "model.layers.1.self_attn.k_proj.weight"
    change_tensors(
        saved,
        lambda tensors: tensors.update(
            {"model.norm.weight": np.ones(24, np.float64), name: tensors[name].astype(np.float16)}
        ),
    )
    module = load_module(saved)
    assert module.dtype == jnp.bfloat16
    assert module.norm.weight.dtype == jnp.float32
    assert module.blocks[0].attention.qkv.kernel.dtype == jnp.bfloat16
    assert module.blocks[1].attention.qkv.kernel.dtype == jnp.float32  # of bfloat16 and float16


def test_dtype_of_integers(saved):
    with pytest.raises(ValueError, match="dtype must be floating point, got int8"):
        load_checkpoint(saved, dtype=jnp.int8)


def test_a_pickle_is_named(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    refuses(saved, "pytorch_model.bin is a pickle; transformers' save_pretrained writes safetensors of it.")


# Several files


@pytest.fixture
def sharded(tmp_path):
    shutil.copytree(Path(__file__).parents[2] / "fixtures" / "decoders" / "llama3", tmp_path / "sharded")
    return tmp_path / "sharded"


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def change_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


def test_missing_shard(sharded):
    (sharded / SECOND).unlink()
    refuses(sharded, f" is in {SECOND}, but there is no {sharded / SECOND}.")


def test_truncated_shard(sharded):
    (sharded / SECOND).write_bytes((sharded / SECOND).read_bytes()[:-1])
    refuses(sharded, f"{sharded / SECOND} is not a complete safetensors file: ")


def test_index_with_a_tensor_that_its_file_lacks(sharded):
    change_index(sharded, lambda places: places.update({"model.more": FIRST}))
    refuses(sharded, f"says that model.more is in {FIRST}, which does not hold it.")


def test_index_that_lacks_a_tensor(sharded):
    change_index(sharded, lambda places: places.pop("model.norm.weight"))
    refuses(sharded, f"{SECOND} holds model.norm.weight, which {sharded / 'model.safetensors.index.json'} has in None.")


def test_index_with_the_wrong_file(sharded):
    change_index(sharded, lambda places: places.update({"model.norm.weight": FIRST}))
    refuses(sharded, f"{SECOND} holds model.norm.weight, which {sharded / 'model.safetensors.index.json'} has in")


@pytest.mark.parametrize("file", ["../model.safetensors", "..", ".", "", "sub/model.safetensors", "/dev/zero"])
def test_index_with_files_elsewhere(sharded, file):
    change_index(sharded, lambda places: places.update({"model.norm.weight": file}))
    refuses(sharded, f"must name files beside it, got {file!r}.")


@pytest.mark.parametrize(
    ("file", "reason"),
    [("x" * 300, "cannot be read: File name too long."), ("a\0b", "cannot be read: embedded null byte.")],
)
def test_index_with_an_impossible_name(sharded, file, reason):
    change_index(sharded, lambda places: places.update(dict.fromkeys(places, file)))
    refuses(sharded, reason)


def test_index_with_a_directory(sharded):
    (sharded / "folder").mkdir()
    change_index(sharded, lambda places: places.update({"model.norm.weight": "folder"}))
    refuses(sharded, f"{sharded / 'folder'} must be a regular file, got a directory.")


@pytest.mark.parametrize("index", [{}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_index_without_a_weight_map(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refuses(sharded, "must hold weight_map, a JSON object of file names by tensor name, got")


def test_all_shards_are_checked_before_any_is_read(sharded, monkeypatch):
    (sharded / "config.json").write_text((sharded / "config.json").read_text().replace("61", "62"))
    monkeypatch.setattr(Stored, "mapped", lambda self: pytest.fail("a tensor was read"))
    refuses(sharded, "model.embed_tokens.weight must have shape (62, 24) by the config, got (61, 24)")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "qwen2", "quantization_config": {"quant_method": "awq"}}, "quantized weights by 'awq', which"),
        (
            {"model_type": "llama", "quantization_config": {"bits": 4}},
            "holds quantized weights, which",
        ),
        ({"bos_token": "<s>"}, "looks like a model that was converted for CTranslate2"),
    ],
)
def test_formats_of_other_programs_are_named(tmp_path, config, sentence):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.bin").write_bytes(b"\6")
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_copied_in_many_pieces_are_whole(tmp_path, monkeypatch, dtype):
    module = make_llama(vocab_size=300, intermediate_size=200)  # pieces of two blocks, the last one shorter
    save_checkpoint(tmp_path, module, dtype=jnp.bfloat16)
    monkeypatch.setattr(slots, "_PIECE", 2 * 128 * 24)
    monkeypatch.setattr(slots, "_COLUMNS", 10)
    for x, y in zip(leaves(module), leaves(load_module(tmp_path, dtype=dtype)), strict=True):
        np.testing.assert_array_equal(x.astype(jnp.bfloat16).astype(dtype), y)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_in_a_thread_ends_the_load(saved, monkeypatch, ahead):
    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(slots, "_copy", fail)
    monkeypatch.setattr(slots, "_PIECE", 16)
    checkpoint = open_checkpoint(saved)
    if ahead:
        (checkpoint,) = begin_all([checkpoint])
        assert checkpoint.ahead.pieces
    with pytest.raises(OSError, match="the disk is gone"):
        checkpoint.load_module()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_shapes_of_a_checkpoint_are_those_of_its_model(saved, dtype):
    change_tensors(saved, lambda tensors: tensors.update({"model.norm.weight": np.ones(24, np.float32)}))
    shapes, model = open_checkpoint(saved, dtype=dtype).shapes(), load_checkpoint(saved, dtype=dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), model.params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes.params
    )
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes.params))
    assert (shapes.apply_fn, shapes.init_cache_fn) == (model.apply_fn, model.init_cache_fn)
