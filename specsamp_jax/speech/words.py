"""Words of a text's tokens, and their times."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

_WITHOUT_SPACES = frozenset({"zh", "yue", "ja", "th", "lo", "my"})
"""Languages that write no spaces between words; there each character is a word."""

# These belong to the word after and before them. As in the published code and in transformers, punctuation of several
# characters belongs to one of these groups if it is a part of the string.
_OPENING = "\"'“¡¿([{-"
_CLOSING = "\"'.。,，!！?？:：”)]}、"
_ALONE = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"

_BROKEN = "\ufffd"  # decoded from a part of a character


class Word(NamedTuple):
    """A word and its times.

    Attributes:
      start: Seconds from the beginning of the sound.
      end: Seconds from the beginning of the sound.
      text: The word with the space before it, if there is one, and its punctuation: words in a row are the text.
    """

    start: float
    end: float
    text: str


class Group(NamedTuple):
    """Tokens `begin` to `end` of a text, and what they spell."""

    text: str
    begin: int
    end: int


def timed_words(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, "n"],
    edges: Float[np.ndarray, "m"],
    *,
    end_token: int,
    language: str | None,
    offset: float,
) -> tuple[Word, ...]:
    """Returns the words of a text; times have two decimals.

    Args:
      tokenizer: Spells the tokens.
      tokens: The tokens; those from `end_token` on, such as timestamps, are no text.
      edges: Start and end of each token in seconds: `n + 1` numbers.
      end_token: The first token that is no text.
      language: The code of the text's language. None: English.
      offset: Seconds that are added to all times.
    """
    index = np.flatnonzero(tokens < end_token)
    words = split_words(tokenizer, tokens[index].tolist(), language)

    times = [round(edge + offset, 2) for edge in edges.tolist()]
    return tuple(Word(times[index[begin]], times[index[end - 1] + 1], text) for text, begin, end in words)


def split_words(tokenizer: Tokenizer, tokens: Sequence[int], language: str | None) -> list[Group]:
    """Returns the words of a text: split before spaces and at punctuation, which then joins the word that it is of."""
    words: list[Group] = []
    for part in _characters(tokenizer, tokens):
        apart = part.text.startswith(" ") or part.text.strip() in _ALONE or language in _WITHOUT_SPACES
        words = [*words, part] if apart or not words else [*words[:-1], _joined(words[-1], part)]
    opened: list[Group] = []  # last first
    for word in reversed(words):
        if opened and word.text.startswith(" ") and word.text.strip() in _OPENING:
            opened[-1] = _joined(word, opened[-1])
        else:
            opened.append(word)
    closed: list[Group] = []
    for word in reversed(opened):
        if closed and not closed[-1].text.endswith(" ") and word.text in _CLOSING:
            closed[-1] = _joined(closed[-1], word)
        else:
            closed.append(word)
    return closed


def _characters(tokenizer: Tokenizer, tokens: Sequence[int]) -> Iterator[Group]:
    """The fewest tokens in turn that spell whole characters."""
    whole, begin, position = tokenizer.decode(tokens, skip_special_tokens=False), 0, 0
    for end in range(1, len(tokens) + 1):
        text = tokenizer.decode(tokens[begin:end], skip_special_tokens=False)
        broken = text.find(_BROKEN)
        # Text that is broken even as a whole is not completed by further tokens.
        if broken < 0 or whole[position + broken : position + broken + 1] in ("", _BROKEN) or end == len(tokens):
            yield Group(text, begin, end)
            begin, position = end, position + len(text)


def _joined(first: Group, second: Group) -> Group:
    return Group(first.text + second.text, first.begin, second.end)
