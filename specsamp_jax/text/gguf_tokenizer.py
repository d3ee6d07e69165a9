"""Tokenizers from the metadata of GGUF files: byte-level BPE, and SentencePiece's BPE with scores."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from specsamp_jax._files import BOOLEAN, TEXT, TEXT_LIST, Kind, brief, whole_number
from specsamp_jax._gguf import Header
from specsamp_jax.text.tokenizer_file import no_panic

_KEY = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # types of tokens
_ROLES = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_SPACE = "▁"  # SentencePiece writes a space so
# Scores of Gemma do not follow the order of its merges, which that of its tokens does.
_ORDERED_BY_ID = ("gemma", "gemma2", "gemma3")
_MAX_CHARACTERS = 1 << 24  # of all pieces; those of Gemma have 1.7 million
_MAX_PIECE = 1000  # characters
_ARRAY = Kind("an array of numbers", lambda value: isinstance(value, np.ndarray))


class _Split(NamedTuple):
    """Pre-tokenization of a byte-level BPE, and what the original tokenizers of its name have beside it.

    Attributes:
      pattern: The regular expression of words. None: that of GPT-2.
      digits: Whether each digit is a word.
      nfc: Whether texts are brought to Unicode's normal form C.
      ignores_merges: Whether a word that is a token is one, whatever the merges say.
      adds_bos: Whether a text begins with the begin token, if the file does not say so.
    """

    pattern: str | None = None
    digits: bool = False
    nfc: bool = False
    ignores_merges: bool = False
    adds_bos: bool = False


_SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_LLAMA3 = rf"{_SUFFIXES}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _Split(_LLAMA3, ignores_merges=True, adds_bos=True)
SPLITS = {
    "gpt-2": _Split(),
    "smollm": _Split(digits=True),
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "smaug-bpe": _Split(_LLAMA3),
    "qwen2": _Split(_QWEN2, nfc=True),
    "deepseek-r1-qwen": _Split(_QWEN2),
    "tekken": _Split(_TEKKEN, ignores_merges=True, adds_bos=True),
}
"""Pre-tokenizations by `tokenizer.ggml.pre`."""


def build_tokenizer(header: Header) -> tuple[Tokenizer, dict[str, str], dict[str, str]]:
    """Returns the tokenizer of a GGUF file, its special tokens by role, and its chat templates by name.

    The tokens of a text are those of the tokenizer.json of the same model.

    Raises:
      ValueError: The file holds no tokenizer, one of a kind that is not supported, or one that contradicts itself.
    """
    kind, tokens = header.setting(f"{_KEY}model", TEXT), header.setting(f"{_KEY}tokens", TEXT_LIST)
    if kind not in _KINDS or not tokens:
        has = "none" if kind is None else f"{brief(kind)} with {len(tokens or []):,} tokens"
        raise ValueError(
            f"{header.path} must hold a tokenizer of the kind 'gpt2' (byte-level BPE) or 'llama' (SentencePiece), got "
            f"{has}; --tokenizer names another."
        )
    types = header.setting(f"{_KEY}token_type", _ARRAY, np.ones(len(tokens), np.int32))
    _check_length(header, "token_type", types, tokens)
    try:
        tokenizer, adds_bos = _KINDS[kind](header, tokens, types)
        for token_kind in (_CONTROL, _USER_DEFINED):
            special = token_kind == _CONTROL
            contents = [tokens[i] for i in np.flatnonzero(types == token_kind)]
            added = [AddedToken(each, normalized=False, special=special) for each in contents if each]
            # A piece that is spelled otherwise in the vocabulary is found by its merges.
            added = [each for each in added if tokenizer.token_to_id(each.content) is not None]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
        ids = {role: header.setting(_KEY + key, whole_number(0, len(tokens) - 1)) for role, key in _ROLES.items()}
        _add_ends(tokenizer, header, tokens, ids, adds_bos)
    except ValueError as error:
        if str(header.path) in str(error):
            raise
        raise ValueError(f"{header.path} holds a tokenizer that cannot be used: {error}") from error
    special_tokens = {role: tokens[i] for role, i in ids.items() if i is not None}
    return tokenizer, special_tokens, dict(_templates(header))


def _check_length(header: Header, name: str, values: Sequence[Any] | np.ndarray, tokens: Sequence[str]) -> None:
    if len(values) != len(tokens):
        raise ValueError(
            f"{_KEY}{name} in {header.path} must have {len(tokens):,} values, as tokens, got {len(values):,}."
        )


def _byte_level(header: Header, tokens: list[str], types: np.ndarray) -> tuple[Tokenizer, bool]:
    """A byte-level BPE, and whether a text begins with the begin token by default."""
    name = header.setting(f"{_KEY}pre", TEXT)
    if name not in SPLITS:
        names = ", ".join(map(repr, SPLITS))
        raise ValueError(
            f"{_KEY}pre in {header.path} must be one of {names}, got {brief(name)}; --tokenizer names the folder of "
            "another tokenizer."
        )
    split = SPLITS[name]
    merges = [_pair(header, merge) for merge in header.setting(f"{_KEY}merges", TEXT_LIST, [])]
    tokenizer = Tokenizer(no_panic(models.BPE, _vocabulary(tokens), merges, ignore_merges=split.ignores_merges))
    if split.nfc:
        tokenizer.normalizer = normalizers.NFC()
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if split.digits else []
    if split.pattern is not None:
        parts.append(pre_tokenizers.Split(Regex(split.pattern), "isolated"))
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split.pattern is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, split.adds_bos


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    """Ids by token; the first id if a token occurs twice."""
    return {token: i for i, token in reversed(list(enumerate(tokens)))}


def _pair(header: Header, merge: str) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or not left or not right or " " in right:
        raise ValueError(
            f"{_KEY}merges in {header.path} must be two tokens each, with a space between, got {brief(merge)}."
        )
    return left, right


def _sentencepiece(header: Header, tokens: list[str], types: np.ndarray) -> tuple[Tokenizer, bool]:
    """A BPE over characters, with bytes for those that it does not have; by default a text begins with a token."""
    architecture = header.metadata.get("general.architecture")
    scores = header.setting(f"{_KEY}scores", _ARRAY)
    if architecture in _ORDERED_BY_ID:
        scores = -np.arange(len(tokens))
        # Several spaces are stored as such.
        tokens = [_SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
    elif scores is None:
        raise ValueError(f"{header.path} must hold {_KEY}scores, which is missing.")
    _check_length(header, "scores", scores, tokens)
    if sum(map(len, tokens)) > _MAX_CHARACTERS or max(map(len, tokens)) > _MAX_PIECE:
        raise ValueError(
            f"{_KEY}tokens in {header.path} must have at most {_MAX_PIECE:,} characters each and {_MAX_CHARACTERS:,} "
            "in all, and have more."
        )
    vocabulary = _vocabulary(tokens)
    unknown = next((tokens[i] for i in np.flatnonzero(types == _UNKNOWN)), None)
    merges = _merges(tokens, types, scores, vocabulary)
    options: dict[str, Any] = {"byte_fallback": True, "fuse_unk": True, "unk_token": unknown}
    tokenizer = Tokenizer(no_panic(models.BPE, vocabulary, merges, **options))
    adds_space = header.setting(f"{_KEY}add_space_prefix", BOOLEAN, architecture not in _ORDERED_BY_ID)
    scheme = "first" if adds_space else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme, split=False)
    parts: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if adds_space else [])])
    return tokenizer, True


def _merges(
    tokens: list[str], types: np.ndarray, scores: np.ndarray, vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, best token first: SentencePiece merges any pair whose text is a token."""
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    skipped = types == _BYTE
    merges = []
    for i in order[~skipped[order]].tolist():
        token = tokens[i]
        cuts = range(len(token) - 1, 0, -1)
        pairs = ((token[:cut], token[cut:]) for cut in cuts)
        merges += [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
    return merges


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _add_ends(
    tokenizer: Tokenizer, header: Header, tokens: list[str], ids: dict[str, int | None], adds_bos: bool
) -> None:
    """Makes the tokenizer put a begin token before a text and an end token after it, if the file asks for them."""
    ends = {
        role: ids[f"{role}_token"] if header.setting(f"{_KEY}add_{role}_token", BOOLEAN, default) else None
        for role, default in (("bos", adds_bos), ("eos", False))
    }
    pieces = [f"{role}:0" for role in ("bos",) if ends[role] is not None]
    pieces += ["$A:0", *(f"{role}:0" for role in ("eos",) if ends[role] is not None)]
    special = [{"id": role, "ids": [i], "tokens": [tokens[i]]} for role, i in ends.items() if i is not None]
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


def _templates(header: Header) -> Iterator[tuple[str, str]]:
    name = "tokenizer.chat_template"
    if (default := header.setting(name, TEXT)) is not None:
        yield "default", default
    for key in header.metadata:
        if key.startswith(f"{name}."):
            yield key.removeprefix(f"{name}."), header.setting(key, TEXT)
