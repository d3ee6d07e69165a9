"""generation_config.json: settings of published checkpoints are read, unsupported ones raise errors."""

import json
import re

import pytest

import specsamp_jax as ss
from specsamp_jax.models import load_generation_config

GREEDY = ss.SamplingParams(temperature=0.0)


@pytest.fixture
def write(tmp_path):
    def write(name="generation_config.json", **values):
        (tmp_path / name).write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("values", "sampling", "eos_token"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True, "temperature": 0.9}, GREEDY, (2,)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 9], "max_length": 4096},
            ss.SamplingParams(0.6, 50, 0.9, 0.0),
            (7, 9),
        ),
        (
            {"do_sample": True, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.0, "typical_p": None},
            ss.SamplingParams(1.0, 20, 1.0, 0.1),
            (),
        ),
        ({"do_sample": True, "top_k": 0, "pad_token_id": 0, "num_beams": 1}, ss.SamplingParams(), ()),
    ],
)
def test_settings_are_read(write, values, sampling, eos_token):
    assert load_generation_config(write(transformers_version="4.40.1", **values))[:2] == (sampling, eos_token)


def test_without_the_file_config_json_has_the_end_token(write):
    assert load_generation_config(write("config.json", eos_token_id=5, model_type="llama"))[:2] == (GREEDY, (5,))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"num_beams": 4}, "holds num_beams = 4, which is not supported; ignore=('num_beams',), or --ignore num_beams"),
        ({"sequence_bias": [[[3], 1.0]]}, "holds sequence_bias = [[[3], 1.0]], which is not supported"),
        ({"guidance_scale": 3}, "holds guidance_scale = 3"),
        ({"xtc_threshold": 0.1}, "holds xtc_threshold = 0.1, which is unknown and might change what is sampled"),
        ({"do_sample": True, "temperature": "hot"}, "json must be a number of at least 0, got 'hot'."),
        ({"temperature": -1}, "json must be a number of at least 0, got -1."),
        ({"temperature": float("nan")}, "it holds NaN, which is no number in JSON"),
        ({"temperature": 10**400}, "json must be a number of at least 0, got 1000"),
        ({"top_k": -3}, "json must be a whole number from 0 to 2147483647, got -3."),
        ({"top_k": 2.5}, "json must be a whole number from 0 to 2147483647, got 2.5."),
        ({"top_k": 10**12}, "json must be a whole number from 0 to 2147483647, got 1000000000000."),
        ({"top_p": 1.5}, "json must be a number from 0 to 1, got 1.5."),
        ({"min_p": -1}, "json must be a number from 0 to 1, got -1."),
        ({"do_sample": "yes"}, "json must be true or false, got 'yes'."),
        ({"eos_token_id": -7}, "a token or a list of tokens, from 0 to 2147483647, got -7; ignore=('eos_token_id',)"),
        ({"eos_token_id": 10**12}, "from 0 to 2147483647, got 1000000000000"),
        ({"eos_token_id": [[1]]}, "from 0 to 2147483647, got [[1]]"),
        ({"eos_token_id": "</s>"}, "generation_config.json must be a token or a list of tokens"),
    ],
)  # fmt: skip
def test_an_unsupported_setting_raises_an_error(write, values, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_generation_config(write(**values))


@pytest.mark.parametrize("eos_token", [31, [2, 31], -1])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_an_end_token_outside_the_vocabulary_raises_an_error(write, name, eos_token):
    write("config.json", vocab_size=31)
    folder = (
        write(name, vocab_size=31, eos_token_id=eos_token)
        if name == "config.json"
        else write(name, eos_token_id=eos_token)
    )
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a token or a list of tokens, from 0 to 30, got ")):
        load_generation_config(folder)
    assert load_generation_config(folder, ignore=("eos_token_id",)).eos_token == ()


def test_an_unsupported_setting_may_be_ignored_on_request(write):
    folder = write(do_sample=True, top_k=3, num_beams=2)
    read = load_generation_config(folder, ignore=("num_beams",))
    assert read.sampling == ss.SamplingParams(top_k=3)


def test_a_broken_file_raises_an_error(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config.json must be a JSON object, got a list"):
        load_generation_config(tmp_path)
