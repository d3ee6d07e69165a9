"""Embeddings that stay in their file, beside copies of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from small_llama import make_llama

from specsamp_jax.models import load_checkpoint, load_module, save_checkpoint
from specsamp_jax.models.checkpoints.folder import begin_all, open_checkpoint

pytestmark = pytest.mark.optimised(False)

NAME = "model.embed_tokens.weight"


def save(folder, module, dtype, padding=0):
    """Saves a checkpoint whose tensors begin a number of bytes, a multiple of 8, later in the file."""
    save_checkpoint(folder, module, dtype=dtype)
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", "padding": "x" * padding})


def embedding_slot(checkpoint):
    (slot,) = (slot for slot in checkpoint.slots if NAME in slot.tensors)
    return slot


@jax.jit
def all_logits(model, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.apply_fn(model.params, tokens, positions, model.init_cache_fn(*tokens.shape))[0]


@pytest.mark.parametrize("padding", range(0, 64, 8))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_read_from_the_file(tmp_path, dtype, padding):
    save(tmp_path, make_llama(), dtype, padding)
    (checkpoint,) = begin_all([open_checkpoint(tmp_path, rows_in_file=True)])
    entry, values = checkpoint.stored[NAME], embedding_slot(checkpoint).in_file
    shapes = checkpoint.shapes().params["vocabulary"]["embedding"]
    module = checkpoint.load_module()
    embedding = module.vocabulary.embedding[...]
    assert (shapes.shape, shapes.dtype) == (embedding.shape, embedding.dtype)
    before = entry.start % 64 // embedding.dtype.itemsize
    assert embedding.shape == (before + entry.shape[0] * entry.shape[1],)
    assert np.asarray(embedding).ctypes.data == values.ctypes.data, "the embedding was copied"
    # Ids outside the vocabulary are read as the nearest one.
    tokens = jnp.array([[0, 5, 30, 31, 1000], [7, 7, 30, 0, -1]], jnp.int32)
    copied = load_module(tmp_path)
    assert copied.vocabulary.embedding.shape == entry.shape
    rows, expected = module.vocabulary.embed(tokens), copied.vocabulary.embed(tokens)
    assert rows.dtype == expected.dtype
    np.testing.assert_array_equal(rows, expected)


def test_logits_are_equal(tmp_path):
    save(tmp_path, make_llama(), "float32")
    tokens = jnp.array([[0, 5, 30, 2, 1], [7, 7, 30, 0, 9]], jnp.int32)
    models = (open_checkpoint(tmp_path, rows_in_file=True).load(), load_checkpoint(tmp_path))
    assert models[0].params["vocabulary"]["embedding"].ndim == 1
    np.testing.assert_array_equal(*(all_logits(model, tokens) for model in models))


def test_the_progress_ends_with_the_number_of_weights(tmp_path):
    save(tmp_path, make_llama(), "float32", 8)
    checkpoint, calls = open_checkpoint(tmp_path, rows_in_file=True), []
    checkpoint.load(lambda done, total: calls.append((done, total)))
    num_weights = sum(np.prod(entry.shape) for entry in checkpoint.stored.values())
    assert embedding_slot(checkpoint).in_file.size > 31 * 24
    assert calls[-1] == (num_weights, num_weights)


def test_tensors_of_the_file_begin_at_all_offsets(tmp_path):
    offsets = set()
    for padding in range(0, 64, 8):
        save(tmp_path, make_llama(), "float32", padding)
        offsets.add(open_checkpoint(tmp_path).stored[NAME].start % 64)
    assert offsets == set(range(0, 64, 8))


def test_an_embedding_that_is_converted_is_copied(tmp_path):
    save(tmp_path, make_llama(), "bfloat16")
    checkpoint = open_checkpoint(tmp_path, dtype="float32", rows_in_file=True)
    assert embedding_slot(checkpoint).in_file is None
    assert checkpoint.load_module().vocabulary.embedding.shape == (31, 24)


def test_an_embedding_that_is_the_head_is_copied(tmp_path):
    save(tmp_path, make_llama(tie_word_embeddings=True), "float32")
    checkpoint = open_checkpoint(tmp_path, rows_in_file=True)
    assert all(slot.in_file is None for slot in checkpoint.slots)
    assert checkpoint.load_module().vocabulary.embedding is None


def test_an_accelerator_gets_a_copy(tmp_path, monkeypatch):
    save(tmp_path, make_llama(), "float32")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    checkpoint = open_checkpoint(tmp_path, rows_in_file=True)
    assert all(slot.in_file is None for slot in checkpoint.slots)


@pytest.mark.parametrize(
    ("change_fn", "message"),
    [
        (lambda values: {NAME: values[:-1].copy()}, r"must have shape \(31, 24\) by the config"),
        (lambda values: {NAME: values.astype(np.int32)}, "must be floating point, got I32"),
        (lambda values: {}, "must hold the tensor model.embed_tokens.weight, which is missing"),
    ],
    ids=["shape", "dtype", "missing"],
)
def test_a_broken_embedding_is_refused(tmp_path, change_fn, message):
    save(tmp_path, make_llama(), "float32")
    path = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(tensors | change_fn(tensors.pop(NAME)), path)
    checkpoint = open_checkpoint(tmp_path, rows_in_file=True)
    for load_fn in (checkpoint.shapes, checkpoint.load_module):
        with pytest.raises(ValueError, match=message):
            load_fn()
