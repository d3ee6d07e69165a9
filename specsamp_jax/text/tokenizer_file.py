"""Reads tokenizer.json with the `tokenizers` library, which is written in Rust.

Rust code that meets a state it did not expect panics: the panic is an exception that `except Exception` does not catch,
or it ends the process. Files known to do so are refused before the library sees them; other panics become ValueError.
"""

import base64
import binascii
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from specsamp_jax._files import read_text

_MAX_GROWTH = 1000
"""Limit of the factor by which normalization may lengthen a text. Unicode's own normal forms stay below 20."""

_PARTS = ("normalizers", "pretokenizers", "processors", "decoders")  # of a Sequence of each kind


def read_tokenizer(file: Path) -> Tokenizer:
    """Returns the tokenizer in a tokenizer.json, without truncation and padding.

    Args:
      file: The file.

    Raises:
      ValueError: There is no such file, it is no regular file, or it is no tokenizer that the library can use.
    """
    try:
        text = read_text(file)
    except FileNotFoundError:
        raise ValueError(f"A checkpoint must hold {file.name}, but there is no {file}.") from None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no tokenizer: it is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is no tokenizer: it must be a JSON object, got a {type(values).__name__}.")
    try:
        _check(values)
        tokenizer = no_panic(Tokenizer.from_str, text)
    except Exception as error:  # `_check` reads values of any type
        raise ValueError(f"{file} is no tokenizer: {error}.") from error
    # A saved tokenizer may truncate or pad texts to the length used in training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def no_panic(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Returns the result of a function of the `tokenizers` library; its errors and panics are raised as ValueError."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        # The library raises `Exception` itself. The class of panics derives from BaseException and cannot be imported.
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library failed on it: {error}") from error


def _check(values: Mapping[str, Any]) -> None:
    """Checks the parts of a tokenizer that are known to panic, to end the process, or to fill the memory."""
    for name in ("normalizer", "decoder"):
        growth = 1.0
        for part in _components(values.get(name)):
            if part.get("type") == "Precompiled":
                _check_character_map(part.get("precompiled_charsmap"))
            growth *= _growth(part)
        if growth > _MAX_GROWTH:
            raise ValueError(f"its {name} may make a text {growth:.2g} times longer; at most {_MAX_GROWTH} is allowed")
    for part in _components(values.get("post_processor")):
        if part.get("type") == "TemplateProcessing":
            _check_template(part)


def _components(value: Any) -> Iterator[Mapping[str, Any]]:
    """The components within a normalizer, decoder or post-processor, those of nested sequences included."""
    if isinstance(value, dict):
        yield value
        for name in _PARTS:
            nested = value.get(name)
            for part in nested if isinstance(nested, list) else ():
                yield from _components(part)


def _check_character_map(encoded: Any) -> None:
    """Checks the sizes in SentencePiece's map: 4 bytes with the size of a trie, the trie, and the replacements."""
    if not isinstance(encoded, str):
        return  # the library says so
    try:
        content = base64.b64decode(encoded, validate=True)
    except binascii.Error as error:
        raise ValueError(f"its precompiled_charsmap is not base64: {error}") from error
    size = int.from_bytes(content[:4], "little")
    if len(content) < 4 or size % 4 or not 0 < size <= len(content) - 4:
        raise ValueError(f"its precompiled_charsmap of {len(content)} bytes holds a trie of {size} bytes")


def _growth(part: Mapping[str, Any]) -> int | float:
    """Factor by which a component that replaces or prepends text may lengthen a text."""
    if part.get("type") == "Prepend":
        return max(1, len(str(part.get("prepend", ""))))
    if part.get("type") != "Replace":
        return 1
    content, pattern = part.get("content"), part.get("pattern")
    replaced = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match one character, or the empty text between any two.
    length = len(replaced) if isinstance(replaced, str) else 0
    return max(1, len(str(content)) / length) if length else 1 + len(str(content))


def _check_template(part: Mapping[str, Any]) -> None:
    described = part.get("special_tokens")
    for name in ("single", "pair"):
        pieces = part.get(name)
        for piece in pieces if isinstance(pieces, list) else ():
            token = piece.get("SpecialToken") if isinstance(piece, dict) else None
            text = token.get("id") if isinstance(token, dict) else None
            if isinstance(text, str) and isinstance(described, dict) and text not in described:
                raise ValueError(f"its post_processor uses the special token {text!r}, which it does not define")
