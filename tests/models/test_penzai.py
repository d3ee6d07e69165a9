"""A decoder that nobody here wrote: penzai's, with penzai's own cache, by the README's example."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

pz = pytest.importorskip("penzai.pz")

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_text_of_the_readme_s_example_is_penzai_s_own():
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "penzai" in code)
    example = {}
    exec(compile(code, "README.md", "exec"), example)
    tokens, lengths = np.asarray(example["text"].tokens), np.asarray(example["text"].lengths)
    assert lengths.tolist() == [25, 22]

    @jax.jit
    def likeliest(text):
        """The token that penzai finds likeliest behind each token, without a cache and without us."""
        return example["transformer"](pz.nx.wrap(text, "seq")).unwrap("seq", "vocabulary").argmax(-1)

    for row, (prompt_length, length) in enumerate(zip(example["lengths"], lengths, strict=True)):
        # The example's model knows 0 as a token, and nothing looks at what follows it.
        text = np.maximum(tokens[row], 0)
        assert text[prompt_length:length].tolist() == likeliest(text)[prompt_length - 1 : length - 1].tolist()
    # Drafts were accepted, and drafts were taken back from penzai's cache.
    stats = example["text"].stats
    assert 0 < stats.num_accepted.sum() < stats.num_drafted.sum()
