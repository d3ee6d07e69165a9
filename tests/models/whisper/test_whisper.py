"""Whisper against the transformers library: outputs within 1e-4 of the largest in float32; and its cache."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixture_files import arrays, assert_near
from flax import nnx
from whisper_fixture import FIXTURES, SHORT, generated, module, outputs, waveform, windows

from specsamp_jax.models import load_checkpoint, load_module, save_checkpoint
from specsamp_jax.models.whisper.checkpoint import encoder_difference
from specsamp_jax.models.whisper.features import log_mel
from specsamp_jax.models.whisper.model import Whisper, WhisperConfig, decoder_model, encode

pytestmark = pytest.mark.optimised(False)


def states(name):
    return encode(module(name), windows(name, SHORT[: len(outputs(name)["tokens"])]))


def run(model, tokens, positions, cache):
    return jax.jit(model.apply_fn)(model.params, jnp.asarray(tokens), jnp.asarray(positions), cache)


# Parity


@pytest.mark.parametrize("num_mel_bins", [80, 128])
def test_features_equal_those_of_transformers(num_mel_bins):
    samples = np.pad(waveform(9, 4.321), (0, 480_000 - int(4.321 * 16_000)))
    features = log_mel(samples, num_mel_bins)
    assert features.shape == (num_mel_bins, 3000)
    assert features.dtype == np.float32
    expected = arrays("whisper/features.npz")[str(num_mel_bins)]
    np.testing.assert_allclose(features[:, ::41], expected, rtol=0, atol=1e-4)


def test_encoder_states_equal_those_of_transformers():
    assert_near(states("multilingual"), outputs("multilingual")["states"])
    assert_near(states("english")[:, ::31], outputs("english")["states"])


def test_states_do_not_depend_on_the_batch():
    heard = windows("multilingual", SHORT)
    together = encode(module("multilingual"), heard)
    np.testing.assert_array_equal(encode(module("multilingual"), heard[2:])[0], together[2])


def test_logits_of_a_prefill_equal_those_of_transformers():
    for name, stride in (("multilingual", 1), ("english", 7)):
        tokens, expected = outputs(name)["tokens"], outputs(name)["logits"]
        model = decoder_model(module(name), states(name))
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        logits, _ = run(model, tokens, positions, model.init_cache_fn(*tokens.shape))
        assert logits.dtype == jnp.float32
        assert_near(logits[..., ::stride], expected)


def test_logits_at_different_positions_equal_those_of_transformers():
    """One token, then K + 1, each row at its own position. Tokens of rejected drafts in the cache are replaced."""
    tokens, expected = outputs("multilingual")["tokens"], outputs("multilingual")["logits"]
    model = decoder_model(module("multilingual"), states("multilingual"))
    starts = np.array([7, 3, 15])
    # Tokens that are not the row's own stand from its start on, as drafts that were rejected.
    drafted = np.where(np.arange(24) < starts[:, None], tokens, 5)
    _, cache = run(model, drafted, np.broadcast_to(np.arange(24), tokens.shape), model.init_cache_fn(3, 30))
    rows = np.arange(3)[:, None]
    for size in (1, 6, 1, 2):
        positions = starts[:, None] + np.arange(size)
        logits, cache = run(model, tokens[rows, np.minimum(positions, 23)], positions, cache)
        inside = positions < 24
        assert_near(np.asarray(logits)[inside], expected[rows, np.minimum(positions, 23)][inside])
        starts = starts + size


def test_detected_languages_equal_those_of_transformers():
    model = decoder_model(module("multilingual"), states("multilingual"))
    start = np.full((3, 1), 61)
    logits, _ = run(model, start, np.zeros_like(start), model.init_cache_fn(3, 1))
    detected = 62 + np.argmax(np.asarray(logits)[:, 0, 62:65], axis=-1)
    assert detected.tolist() == generated("multilingual")["languages"]


# What a decoder as a Model is


def test_other_utterances_need_no_new_trace():
    first, second = (
        decoder_model(module("multilingual"), encode(module("multilingual"), windows("multilingual", [sound])))
        for sound in (SHORT[0], SHORT[1])
    )
    assert first.apply_fn == second.apply_fn
    assert hash(first.apply_fn) == hash(second.apply_fn)
    assert first.init_cache_fn == second.init_cache_fn
    assert jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_close_and_returns_float32_logits(dtype):
    half = load_module(FIXTURES / "multilingual", dtype=dtype)
    heard = encode(half, windows("multilingual", SHORT))
    assert heard.dtype == dtype
    model = decoder_model(half, heard)
    assert model.init_cache_fn(1, 4)[0].keys.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(dtype)}
    tokens = outputs("multilingual")["tokens"]
    positions = np.broadcast_to(np.arange(24), tokens.shape)
    logits, _ = run(model, tokens, positions, model.init_cache_fn(*tokens.shape))
    assert logits.dtype == jnp.float32
    expected = outputs("multilingual")["logits"]
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.1 * np.sqrt(np.mean(expected**2))


def test_padding_is_read_as_token_0_and_a_position_beyond_the_maximum_gives_finite_logits():
    model = decoder_model(module("english"), states("english")[:1])
    padding, first = (run(model, [[token]], [[0]], model.init_cache_fn(1, 100))[0] for token in (-1, 0))
    np.testing.assert_array_equal(padding, first)
    logits, _ = run(model, [[0]], [[99]], model.init_cache_fn(1, 100))
    assert np.isfinite(logits).all()


# Encoders that are the same


def test_a_distilled_drafter_has_the_encoder_of_its_target():
    assert encoder_difference(module("multilingual"), module("distilled")) is None
    assert encoder_difference(module("multilingual"), module("english")) == "num_mel_bins"
    other = load_module(FIXTURES / "distilled", dtype="float32")
    bias = other.encoder.blocks[1].mlp.down.bias
    bias.set_value(bias[...].at[3].add(1e-7))
    assert encoder_difference(module("multilingual"), other) == "model.encoder.layers.1.fc2.bias"
    half = load_module(FIXTURES / "distilled", dtype="bfloat16")
    assert encoder_difference(module("multilingual"), half) == "dtype"


# Files


def test_a_saved_whisper_is_loaded_unchanged(tmp_path):
    save_checkpoint(tmp_path, module("multilingual"), dtype="float32")
    loaded = load_module(tmp_path, dtype="float32")
    assert loaded.config == module("multilingual").config
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(nnx.state(loaded)),
        nnx.to_pure_dict(nnx.state(module("multilingual"))),
    )


def test_a_whisper_is_refused_as_a_model_of_text():
    with pytest.raises(ValueError, match="Whisper"):
        load_checkpoint(FIXTURES / "distilled")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bart"}, "model_type must be 'whisper', got 'bart'"),
        ({"activation_function": "relu"}, "activation_function must be 'gelu', got 'relu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings must be True, got False"),
        ({"decoder_layers": 0}, "decoder_layers must be a whole number above 0, got 0"),
        ({"encoder_attention_heads": 5}, "encoder_attention_heads must divide d_model = 384, got 5"),
        ({"d_model": 15, "encoder_attention_heads": 5, "decoder_attention_heads": 5}, "d_model must be even"),
    ],
)
def test_an_invalid_config(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        WhisperConfig.from_dict({"model_type": "whisper", **change})


def test_published_sizes_have_their_number_of_parameters():
    """From the config alone: 37.8 million parameters for tiny, 1543.5 for large-v3, 756.4 for distil-large-v3."""
    large = {"num_mel_bins": 128, "d_model": 1280, "encoder_layers": 32, "decoder_layers": 32, "vocab_size": 51866}
    large |= {"encoder_attention_heads": 20, "decoder_attention_heads": 20}
    large |= {"encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120}
    for sizes, millions in (({}, 37.8), (large, 1543.5), ({**large, "decoder_layers": 2}, 756.4)):
        config = WhisperConfig(**sizes)
        params = nnx.state(nnx.eval_shape(lambda config=config: Whisper(config, rngs=nnx.Rngs(0))))
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.to_pure_dict(params)))
        assert round(count / 1e6, 1) == millions, dataclasses.asdict(config)


@pytest.mark.parametrize(
    ("features", "sentence"),
    [
        (
            np.zeros((1, 80, 3000), "f"),
            "features must have shape [B, M, F] = [B, 80, 200] by the config, got [1, 80, 3000]",
        ),
        (np.zeros((80, 200), "f"), "got [80, 200]"),
    ],
)
def test_features_of_another_window(features, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inspect.unwrap(encode)(module("multilingual"), features)


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([0.0] * 500, "waveform must be a floating-point array of shape [N], samples from -1 to 1, got list"),
        (np.zeros(500, np.int16), "got int16[500]"),
        (np.zeros((2, 500), "f"), "got float32[2, 500]"),
        (np.zeros(200, "f"), "waveform must have more than 200 samples to be mirrored, got 200"),
        (np.full(500, np.nan, "f"), "waveform must be finite"),
    ],
)
def test_waveforms_without_features(samples, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        inspect.unwrap(log_mel)(samples, 80)
