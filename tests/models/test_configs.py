"""config.json of each family, in its old and its new form: settings that are read, and settings that raise errors."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_llama import SIZES

from specsamp_jax.models import (
    Gemma2Config,
    Gemma3Config,
    GemmaConfig,
    Llama,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from specsamp_jax.models.rotary import LinearScaling, Llama3Scaling, YarnScaling, rotary_angles

LLAMA3 = {
    "factor": 8,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, GemmaConfig, Gemma2Config, Gemma3Config]
PUBLISHED = {"architectures": ["X"], "torch_dtype": "bfloat16", "transformers_version": "4.31.0", "use_cache": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_through_json(family):
    config = family(**SIZES, rope_scaling=LinearScaling(2.0))
    assert family.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "setting",
    [
        {"sliding_window": 8},
        {"layer_types": ("full_attention", "full_attention")},
        {"query_pre_attn_scalar": 8},
        {"rope_local_base_freq": 8.0},
        {"attn_logit_softcapping": 5.0},
        {"final_logit_softcapping": 5.0},
    ],
)
def test_a_setting_of_another_family_is_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name} must be None, for 'llama' does not have it, got"):
        LlamaConfig(**SIZES, **setting)
    assert name not in LlamaConfig(**SIZES).to_dict()
    family = Gemma3Config if name == "rope_local_base_freq" else Gemma2Config
    assert getattr(family(**SIZES, **setting), name) == setting[name]


def test_a_config_of_another_family_is_refused():
    with pytest.raises(ValueError, match="config must be one of 'llama' for Llama, got 'qwen2'"):
        Llama(Qwen2Config(**SIZES), rngs=nnx.Rngs(0))


def test_sheared_llama():
    values = {
        **PUBLISHED,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 5504,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    }
    config = LlamaConfig(32000, 2048, 5504, 24, 16, 16, rms_norm_eps=1e-5, max_position_embeddings=4096)
    assert LlamaConfig.from_dict(values) == config
    assert LlamaConfig.from_dict({**values, "num_key_value_heads": None}) == config


@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_rope_scaling_in_its_old_and_its_new_form(kind):
    values = {"model_type": "llama", **SIZES}
    old = LlamaConfig.from_dict({**values, "rope_scaling": {kind: "llama3", **LLAMA3}})
    del values["rope_theta"]
    new = LlamaConfig.from_dict({**values, "rope_parameters": {kind: "llama3", "rope_theta": 500.0, **LLAMA3}})
    assert old == new
    assert new.rope_scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)
    assert hash(old) == hash(new)


def test_the_scaled_rotation_angles_of_llama3():
    # theta 10^4, 8 features: 1, 0.1, 0.01, 0.001 radians a position are 1304, 130, 13 and 1.3 turns over 8192.
    scaling = Llama3Scaling(8.0, 2.0, 14.0, 8192)
    _, sine = rotary_angles(jnp.array([[1]]), 8, 1e4, scaling)
    turns = 8192 * 0.01 / (2 * np.pi)
    fast = (turns - 2) / 12
    np.testing.assert_allclose(np.ravel(sine), np.sin([1, 0.1, 0.01 * (fast + (1 - fast) / 8), 0.001 / 8]), rtol=1e-6)


def test_the_scaled_rotation_angles_of_yarn():
    # Frequencies of transformers 5.24.0 for theta 10^4 and 16 features.
    scaling = YarnScaling(8.0, 2048, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25)
    cosine, sine = rotary_angles(jnp.array([[1]]), 16, 1e4, scaling)
    expected = np.array([1.0, 0.3162278, 0.1, 0.02239947, 0.004166666, 0.0003952847, 0.000125, 3.952847e-05])
    np.testing.assert_allclose(np.ravel(sine), 1.25 * np.sin(expected), rtol=1e-6)
    np.testing.assert_allclose(np.ravel(cosine), 1.25 * np.cos(expected), rtol=1e-6)


def test_yarn_as_qwen_publishes_it():
    published = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": None}
    config = Qwen2Config.from_dict({"model_type": "qwen2", **SIZES, "rope_scaling": published})
    assert config.rope_scaling == YarnScaling(4.0, 32768)
    np.testing.assert_allclose(config.rope_scaling.amplitude, 1.1386294)
    assert Qwen2Config.from_dict(config.to_dict()) == config
    short = {"type": "yarn", "factor": 4.0, "finetuned": True}  # a note, and no original length
    sizes = {**SIZES, "max_position_embeddings": 32768}
    assert Qwen2Config.from_dict({"model_type": "qwen2", **sizes, "rope_scaling": short}).rope_scaling == YarnScaling(
        4.0, 32768
    )
    with pytest.raises(ValueError, match="must hold original_max_position_embeddings"):
        Qwen2Config.from_dict({"model_type": "qwen2", **SIZES, "rope_scaling": short})
    with pytest.raises(ValueError, match="must not hold mscale"):
        Qwen2Config.from_dict({"model_type": "qwen2", **SIZES, "rope_scaling": {**published, "mscale": 1.0}})
    with pytest.raises(ValueError, match="must be above beta_slow"):
        YarnScaling(4.0, 32768, beta_fast=1.0)


def test_settings_that_published_configs_leave_out_have_defaults():
    sizes = {key: value for key, value in SIZES.items() if key not in ("head_dim", "rope_theta", "rms_norm_eps")}
    gemma = GemmaConfig.from_dict({**PUBLISHED, **sizes, "model_type": "gemma", "hidden_act": "gelu"})
    assert (gemma.tie_word_embeddings, gemma.head_size, gemma.rms_norm_eps) == (True, 256, 1e-6)
    gemma2 = Gemma2Config.from_dict({**PUBLISHED, **sizes, "model_type": "gemma2", "cache_implementation": "hybrid"})
    assert (gemma2.attn_logit_softcapping, gemma2.final_logit_softcapping) == (50.0, 30.0)
    assert gemma2.windows == (4096, None)
    gemma3 = Gemma3Config.from_dict({**PUBLISHED, **sizes, "model_type": "gemma3_text", "sliding_window_pattern": 6})
    assert gemma3.ropes == ((10_000.0, None),) * 2
    gemma3 = dataclasses.replace(gemma3, num_hidden_layers=7, rope_scaling=LinearScaling(8.0))
    assert gemma3.ropes[4:] == ((10_000.0, None), (1_000_000.0, LinearScaling(8.0)), (10_000.0, None))
    assert gemma3.windows[4:] == (4096, None, 4096)
    qwen2 = Qwen2Config.from_dict(
        {**PUBLISHED, **sizes, "model_type": "qwen2", "sliding_window": 32768, "max_window_layers": 1,
         "use_sliding_window": False}
    )  # fmt: skip
    assert (qwen2.windows, qwen2.head_size, qwen2.tie_word_embeddings) == ((None, None), 4, False)
    assert Qwen3Config.from_dict({**PUBLISHED, **sizes, "model_type": "qwen3"}).head_size == 128
    assert MistralConfig.from_dict({**PUBLISHED, **sizes, "model_type": "mistral"}).windows == (4096, 4096)


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (LlamaConfig, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type must be one of 'default', 'li"),
        (LlamaConfig, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "got 'dynamic'; other scalings are n"),
        (LlamaConfig, {"rope_scaling": {"type": "linear"}}, "rope scaling 'linear' must hold factor, got {}."),
        (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": 0}}, "factor of rope scaling 'linear' must be"),
        (LlamaConfig, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of rope scaling"),
        (LlamaConfig, {"rope_scaling": {"type": "linear", "rope_type": "llama3"}}, "rope_type must be one of"),
        (LlamaConfig, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "must hold low_freq_factor, high"),
        (
            LlamaConfig,
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1.0}},
            "high_freq_factor of rope scaling 'llama3' must be above low_freq_factor = 1.0, got 1.0.",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "rope scaling 'default' must not hold partial_rotary_factor",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "The config must hold one of rope_scaling and rope_parameters",
        ),
        (LlamaConfig, {"rope_scaling": [1]}, "rope_scaling must be a JSON object, got [1]."),
        (LlamaConfig, {"sliding_window": 4096}, "config.json holds sliding_window = 4096, which is not known here"),
        (LlamaConfig, {"partial_rotary_factor": 0.5}, "config.json holds partial_rotary_factor = 0.5"),
        (LlamaConfig, {"hidden_size": "64"}, "hidden_size must be an integer, got '64'."),
        (LlamaConfig, {"hidden_size": True}, "hidden_size must be an integer, got True."),
        (LlamaConfig, {"rms_norm_eps": None}, "rms_norm_eps must be a number, got None."),
        (Qwen2Config, {"use_sliding_window": True}, "use_sliding_window must be False, got True; this is not support"),
        (Qwen2Config, {"layer_types": ["sliding_attention"]}, "layer_types must be 'full_attention' only"),
        (Qwen3Config, {"attention_bias": True}, "attention_bias must be False, got True"),
        (GemmaConfig, {"hidden_act": "silu"}, "hidden_act must be 'gelu_pytorch_tanh', got 'silu'"),
        (GemmaConfig, {"use_bidirectional_attention": True}, "use_bidirectional_attention must be None, got True"),
        (Gemma2Config, {"layer_types": ["full_attention"]}, "layer_types must be one of full_attention and sliding_at"),
        (Gemma3Config, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping must be None, got 50.0"),
        (Gemma3Config, {"sliding_window_pattern": 4}, "sliding_window_pattern must be 6, got 4; this is not support"),
        (
            Gemma3Config,
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}},
            "rope_parameters must hold full_attention and sliding_attention, the latter without scaling, got",
        ),
        (Gemma2Config, {"sliding_window": 0}, "sliding_window must be above 0, got 0."),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_supported_raises_an_error(family, changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        family.from_dict({**family(**SIZES).to_dict(), **changes})


@pytest.mark.parametrize("off", [{"sliding_window": None}, {"moe": False}, {"_name_or_path": "somewhere"}])
def test_an_unsupported_setting_that_is_off_is_allowed(off):
    config = LlamaConfig(**SIZES)
    assert LlamaConfig.from_dict({**config.to_dict(), **off}) == config
