"""penzai's decoder with penzai's own cache, as in examples/penzai_model.py."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.optimised(False)

pz = pytest.importorskip("penzai.pz")


def test_the_example_generates_what_penzai_itself_finds_most_probable():
    import penzai_model

    transformer = penzai_model.small_transformer()
    text = penzai_model.main(transformer)
    tokens, lengths = np.asarray(text.tokens), np.asarray(text.lengths)
    assert lengths.tolist() == [25, 22]

    @jax.jit
    def most_probable(tokens):
        """The most probable token after each token, by penzai alone, without a cache."""
        return transformer(pz.nx.wrap(tokens, "seq")).unwrap("seq", "vocabulary").argmax(-1)

    for row, (prompt_length, length) in enumerate(zip(penzai_model.PROMPT_LENGTHS, lengths, strict=True)):
        # penzai has no padding token. No token before the padding attends to it.
        padded = np.maximum(tokens[row], 0)
        assert padded[prompt_length:length].tolist() == most_probable(padded)[prompt_length - 1 : length - 1].tolist()
    # Some drafts were accepted, and others were removed from penzai's cache.
    assert 0 < text.stats.num_accepted.sum() < text.stats.num_drafted.sum()
