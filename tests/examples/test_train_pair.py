"""examples/pair/train_pair.py, run on tiny models and random text: the whole recipe, a few steps of each part."""

import dataclasses
import json

import numpy as np
import pytest
import train_pair

from specsamp_jax.models import load_checkpoint

pytestmark = pytest.mark.optimised(False)

VOCAB_SIZE = 16
SMALLER = {
    "LENGTH": 12,
    "BATCH": 2,
    "DISTIL_BATCH": 4,
    "EVALUATION_BATCH": 2,
    "PROMPT": 4,
    "SAMPLED_AT_ONCE": 4,
    "SAMPLED_ROWS": 4,
    "NUM_CONTINUATIONS": 4,
    "CONTINUED_FROM": 4,
    "CONTINUED_BY": 6,
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    for name, value in SMALLER.items():
        monkeypatch.setattr(train_pair, name, value)
    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for name in ("TARGET", "DRAFTER"):
        monkeypatch.setattr(train_pair, name, dataclasses.replace(getattr(train_pair, name), **sizes))
    documents = np.random.default_rng(0).integers(1, VOCAB_SIZE, (20, 9))
    stream = np.pad(documents, ((0, 0), (1, 0)), constant_values=train_pair.END).astype(np.uint16).ravel()
    for name in ("train", "held_out"):
        np.save(tmp_path / f"{name}.npy", stream)
    return tmp_path


@pytest.mark.slow
def test_the_recipe_makes_a_pair_that_loads_and_reports_its_acceptance(tiny):
    arguments = ["--data", str(tiny), "--out", str(tiny / "out"), "--scale", "0.0001"]
    train_pair.main(arguments, standalone_mode=False)
    report = json.loads((tiny / "out" / "training.json").read_text())
    assert report["continuations"]["what"].startswith("4 held-out documents continued from 4 tokens by up to 6")
    assert 0 < report["acceptance_rate_on_held_out_text"] <= 1
    assert 1 <= report["continuations"]["tokens_a_step"] <= 5
    for name in ("target", "drafter"):
        load_checkpoint(tiny / "out" / name)
