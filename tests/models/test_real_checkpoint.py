"""Real weights, where `bench/real/fetch.sh smollm2` has put them."""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.models import load_checkpoint
from specsamp_jax.text import load_tokenizer

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
SMOLLM2 = CACHE / "specsamp" / "real" / "smollm2"
QUESTION = "Name the planets, nearest to the sun first."
# Of transformers 5.24 with torch 2.13, greedy in float32, on the same folder.
ANSWER = "The planets are Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus, and Neptune.<|im_end|>"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.exists(), reason="bench/real/fetch.sh smollm2 was not run")
@pytest.mark.parametrize("draft", [None, ss.NGramDrafter()], ids=["alone", "ngram"])
def test_greedy_text_is_that_of_transformers(draft):
    model, tokenizer = load_checkpoint(SMOLLM2, dtype="float32"), load_tokenizer(SMOLLM2)
    prompt = np.array([tokenizer.encode_chat([{"role": "user", "content": QUESTION}])])
    models = {"target": model, "draft": draft, "num_draft": 2}
    options = {"sampling": ss.SamplingParams(temperature=0.0), "eos_token": tokenizer.eos_token}
    result = ss.generate(jax.random.key(0), prompt, **models, **options, max_new_tokens=32)
    generated = np.asarray(result.tokens)[0, prompt.shape[1] : int(result.lengths[0])]
    assert tokenizer.tokenizer.decode(generated.tolist(), skip_special_tokens=False) == ANSWER
