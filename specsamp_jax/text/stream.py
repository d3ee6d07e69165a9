"""Text from tokens that arrive one by one, in whole characters."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token of SentencePiece that stands for one byte."""

_UNFINISHED = "\ufffd"
"""What decoders put in the place of bytes that are no character, or no character yet."""

_NUM_KEPT = 4  # A character has four bytes at most: where it is not finished, it began in the last three tokens.


class TextStream:
    r"""The text of a growing sequence of tokens, handed out in pieces that stay as they are.

    The pieces together are the tokenizer's `decode` of all tokens, whatever they are: a character that is spread
    over several tokens is handed out with its last byte, and bytes that are no character as the replacement
    characters that `decode` makes of them. Special tokens give no text. A step decodes the last few tokens, so it
    costs the same at any length.

    A byte-level tokenizer's text is known up to an unfinished character. One that falls back to bytes (`<0x0A>`, as
    Llama 2 and Gemma have them) reads a run of such tokens as a whole, so the run is handed out when it has ended.
    Characters are code points: an emoji made of several of them may come in several pieces.

    Args:
      tokenizer: What made the tokens.
      context: Tokens that stand before the text, such as the prompt that it continues: they are not handed out,
        but a word that follows them begins with its space. None for a text of its own, such as a reply in a chat.

    Example:
      >>> from specsamp_jax.cli.pair import load_pair
      >>> tokenizer = load_pair().tokenizer
      >>> tokens = tokenizer.encode("two 日").ids
      >>> stream = TextStream(tokenizer)
      >>> [stream.push([token]) for token in tokens], stream.flush()
      (['t', 'wo', ' ', '', '', '日'], '')
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        before = [token for token in context if self._is_visible(token)]
        first = max(len(before) - _NUM_KEPT, 0)
        # A run of bytes is kept whole, and so is what may hold nothing but the space that a text's first word loses.
        while first > 0 and (self._is_byte(before[first]) or not tokenizer.decode(before[first:])):
            first -= 1
        # The last tokens, and what of their text was handed out.
        self._window = before[first:]
        self._shown = tokenizer.decode(self._window).removesuffix(_UNFINISHED)

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that is certain with these tokens, possibly none."""
        return "".join(self._push(token) for token in tokens)

    def flush(self) -> str:
        """Returns what was held back, where no more tokens follow."""
        text = self._tokenizer.decode(self._window)
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _push(self, token: int) -> str:
        if not self._is_visible(token):
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""
        text = self._tokenizer.decode(self._window).removesuffix(_UNFINISHED)
        piece, self._shown = text[len(self._shown) :], text
        if len(self._window) > _NUM_KEPT:
            # Both this text and the next lose the same at their first token, so their difference is right; but it
            # must be this text that loses it.
            kept = self._window[-_NUM_KEPT:]
            if shown := self._tokenizer.decode(kept).removesuffix(_UNFINISHED):
                self._window, self._shown = kept, shown
        return piece

    def _is_visible(self, token: int) -> bool:
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None
