"""generation_config.json as published checkpoints have it, and what is refused."""

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
def test_what_it_says(write, values, sampling, eos_token):
    assert load_generation_config(write(transformers_version="4.40.1", **values)) == (sampling, eos_token)


def test_without_the_file_config_json_has_the_end_token(write):
    assert load_generation_config(write("config.json", eos_token_id=5, model_type="llama")) == (GREEDY, (5,))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"repetition_penalty": 1.05}, "holds repetition_penalty = 1.05, which is not supported; ignore="),
        ({"num_beams": 4}, "holds num_beams = 4, which is not supported"),
        ({"suppress_tokens": [3]}, "holds suppress_tokens = [3], which is not supported"),
        ({"min_new_tokens": 3}, "holds min_new_tokens = 3"),
        ({"xtc_threshold": 0.1}, "holds xtc_threshold = 0.1, which is not known here and might change what is sampled"),
        ({"do_sample": True, "temperature": "hot"}, "temperature in "),
        ({"eos_token_id": "</s>"}, "eos_token_id in generation_config.json must be a token or a list of tokens"),
    ],
)  # fmt: skip
def test_what_is_refused(write, values, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_generation_config(write(**values))


def test_what_is_refused_may_be_ignored(write):
    folder = write(do_sample=True, top_k=3, repetition_penalty=1.05)
    read = load_generation_config(folder, ignore=("repetition_penalty",))
    assert read.sampling == ss.SamplingParams(top_k=3)


def test_broken_file(tmp_path):
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"generation_config.json must be a JSON object, got a list"):
        load_generation_config(tmp_path)
