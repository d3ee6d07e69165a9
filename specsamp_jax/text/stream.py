"""Text from tokens that arrive one at a time, in whole characters."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer

from specsamp_jax.text.tokenizer_file import no_panic

_BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A SentencePiece token for a single byte."""

_UNFINISHED = "\ufffd"
"""The character that decoders write for bytes that do not form a character, or do not form one yet."""

_NUM_KEPT = 4  # A character has at most four bytes: an unfinished one began in the last three tokens.


class TextStream:
    r"""The text of a growing sequence of tokens, returned in pieces that never change afterwards.

    The pieces joined are the tokenizer's `decode` of all tokens. A character that is spread over several tokens is
    returned with its last byte, and bytes that form no character as the replacement characters that `decode` writes
    for them. Special tokens give no text. Each step decodes the last few tokens only, so its cost does not grow with
    the length.

    With a byte-level tokenizer, all text is returned except an unfinished character. A tokenizer that falls back to
    bytes (`<0x0A>`, as in Llama 2 and Gemma) decodes a run of such tokens as a whole, so the run is returned when it
    has ended. Characters are code points: an emoji made of several of them may come in several pieces.

    Args:
      tokenizer: The tokenizer of the tokens.
      context: Tokens before the text, such as the prompt that it continues. They are not returned, but a word that
        follows them begins with its space. Empty for a separate text, such as a reply in a chat.

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
        # Keep a run of bytes whole. Keep more, too, if the text is empty: it may be the space that a text's first word
        # loses.
        while first > 0 and (self._is_byte(before[first]) or not self._decode(before[first:])):
            first -= 1
        # The last tokens, and the part of their text that was returned.
        self._window = before[first:]
        self._shown = self._decode(self._window).removesuffix(_UNFINISHED)

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete, possibly empty."""
        return "".join(self._push(token) for token in tokens)

    def flush(self) -> str:
        """Returns the text held back so far; call it after the last token."""
        text = self._decode(self._window)
        piece, self._shown = text[len(self._shown) :], text
        return piece

    def _push(self, token: int) -> str:
        if not self._is_visible(token):
            return ""
        self._window.append(token)
        if self._is_byte(token):
            return ""
        text = self._decode(self._window).removesuffix(_UNFINISHED)
        piece, self._shown = text[len(self._shown) :], text
        if len(self._window) > _NUM_KEPT:
            # The text of the kept tokens may lose a space at its start, and so will the next one: their difference is
            # right. It must not be empty, or the next text alone would lose the space.
            kept = self._window[-_NUM_KEPT:]
            if shown := self._decode(kept).removesuffix(_UNFINISHED):
                self._window, self._shown = kept, shown
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        return no_panic(self._tokenizer.decode, tokens)

    def _is_visible(self, token: int) -> bool:
        return token not in self._special and self._tokenizer.id_to_token(token) is not None

    def _is_byte(self, token: int) -> bool:
        return _BYTE.fullmatch(self._tokenizer.id_to_token(token) or "") is not None
