"""A tiny target of text with a tokenizer and a text, for tests of distillation."""

import json
import shutil

import jax.numpy as jnp
from fixture_files import FIXTURES
from flax import nnx

from specsamp_jax.models import Llama, LlamaConfig, save_checkpoint

TOKENIZER = FIXTURES / "text/byte_level"
SIZES = {"intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def write_target(folder):
    """Writes a target of two layers, its tokenizer and text.txt."""
    parsed = json.loads((TOKENIZER / "tokenizer.json").read_text())
    vocab_size = 1 + max(*parsed["model"]["vocab"].values(), *(token["id"] for token in parsed["added_tokens"]))
    module = Llama(LlamaConfig(vocab_size=vocab_size, hidden_size=16, num_hidden_layers=2, **SIZES), rngs=nnx.Rngs(0))
    module.vocabulary.head.set_value(30 * module.vocabulary.head[...])  # so that its distributions are not flat
    save_checkpoint(folder, module, dtype=jnp.float32)
    for file in TOKENIZER.iterdir():
        shutil.copy(file, folder)
    (folder / "text.txt").write_text("".join(f"line {i} of the text\n\n" for i in range(60)))
    return folder
