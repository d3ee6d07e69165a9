import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from fixture_files import FIXTURES
from flax import nnx

from specsamp_jax.models import load_generation_config, load_module


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_gemma_3_for_images(prefix, tmp_path):
    folder = FIXTURES / "decoders" / "gemma3"
    text = json.loads((folder / "config.json").read_text())
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "mm_tokens_per_image": 256}
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [1, 60]}))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", prefix, 1): values for name, values in tensors.items()}
    images = {f"{prefix.partition('language')[0]}vision_tower.head": np.ones((2, 2), np.float32)}
    safetensors.numpy.save_file(renamed | images, tmp_path / "model.safetensors")
    module, expected = load_module(tmp_path), load_module(folder)
    assert module.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, nnx.state(module), nnx.state(expected))
    assert load_generation_config(tmp_path).eos_token == (1, 60)
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(
        ValueError, match=r"text_config in .*config.json must be an object with model_type 'gemma3_text'"
    ):
        load_module(tmp_path)
