"""The small trained pair in the package: a target, its drafter, and their tokenizer."""

from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
from tokenizers import Tokenizer

from specsamp_jax._types import Model
from specsamp_jax.cli import docstrings
from specsamp_jax.models import load_checkpoint
from specsamp_jax.text.tokenizer_file import read_tokenizer

ASSETS = Path(__file__).parent / "assets"
"""The folder of the tokenizer and of the checkpoints `target` and `drafter`, in Hugging Face's layout."""


class Pair(NamedTuple):
    """A target, a drafter of a tenth of its size, and their tokenizer.

    Attributes:
      target: 7.0 million parameters, trained on docstrings.
      drafter: 0.69 million, distilled from the target.
      tokenizer: Byte-level BPE of 4,096 tokens; `end_token` begins every text.
      end_token: The token that begins each text and ends the text before it.
    """

    target: Model
    drafter: Model
    tokenizer: Tokenizer
    end_token: int

    def encode(self, text: str) -> list[int]:
        """Returns the tokens of the beginning of a text."""
        return [self.end_token, *self.tokenizer.encode(text).ids]


def load_pair() -> Pair:
    """Returns the pair, in float32.

    Its training, and measurements on held-out text, are described in assets/training.json.

    Example:
      >>> pair = load_pair()
      >>> pair.encode("Return the"), pair.tokenizer.decode([843, 269])
      ([0, 843, 269], 'Return the')
    """
    tokenizer = read_tokenizer(docstrings.TOKENIZER_FILE)
    (end_token,) = tokenizer.encode(docstrings.END_TOKEN).ids
    target, drafter = (load_checkpoint(ASSETS / name, dtype=jnp.float32) for name in ("target", "drafter"))
    return Pair(target, drafter, tokenizer, end_token)
