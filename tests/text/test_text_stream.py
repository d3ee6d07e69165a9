"""Text token by token: pieces that were returned never change, and together they are the decoded text."""

import doctest
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from specsamp_jax.text import TextStream, load_tokenizer, stream

FIXTURES = Path(__file__).parents[1] / "fixtures" / "text"
REPLACEMENT = "\ufffd"


def fallback(*decoder):
    """The tokenizer of the Llama 2 fixture with another decoder."""
    tokenizer = Tokenizer.from_str(load_tokenizer(FIXTURES / "byte_fallback").tokenizer.to_str())
    tokenizer.decoder = decoders.Sequence(list(decoder))
    return tokenizer


def words(decoder):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "##b": 1, "'s": 2, ".": 3, "c</w>": 4, "d": 5, "": 6}, "a"))
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


TOKENIZERS = {
    "byte level, as Llama 3": load_tokenizer(FIXTURES / "byte_level").tokenizer,
    "byte fallback, as Llama 2": load_tokenizer(FIXTURES / "byte_fallback").tokenizer,
    "byte fallback, as Gemma": fallback(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
    "metaspace": fallback(decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")),
    "word pieces": words(decoders.WordPiece()),
    "word ends": words(decoders.BPEDecoder()),
    "no decoder": words(None),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request):
    return request.param


def pieces(tokenizer, tokens, context=()):
    stream = TextStream(tokenizer, context)
    return [*(stream.push([token]) for token in tokens), stream.flush()]


def random_tokens(tokenizer, seed, length):
    """Random token ids, some without a token. An odd seed gives mostly single bytes, which are rarely valid UTF-8."""
    rng = np.random.default_rng(seed)
    is_byte = [
        len(tokenizer.id_to_token(i) or "") == 1 or stream._BYTE.match(tokenizer.id_to_token(i) or "")
        for i in range(tokenizer.get_vocab_size() + 2)
    ]
    weights = np.where(is_byte, 1 + 30 * (seed % 2), 1.0)
    return rng.choice(len(weights), size=length, p=weights / weights.sum()).tolist()


def test_the_pieces_joined_are_the_decoded_text(tokenizer):
    for seed in range(60):
        tokens = random_tokens(tokenizer, seed, 40)
        assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_pieces_after_a_prompt_are_the_rest_of_the_decoded_text(tokenizer):
    for seed in range(60):
        tokens = random_tokens(tokenizer, seed, 40)
        before, after = tokens[:20], tokens[20:]
        text = tokenizer.decode(before)
        if text.endswith(REPLACEMENT) or not tokenizer.decode(tokens).startswith(text):
            continue  # a prompt that ends within a character
        assert text + "".join(pieces(tokenizer, after, before)) == tokenizer.decode(tokens)


def test_several_tokens_at_once_give_the_same_text(tokenizer):
    tokens = random_tokens(tokenizer, 0, 40)
    stream = TextStream(tokenizer)
    together = [stream.push(tokens[:7]), stream.push(()), stream.push(tokens[7:])]
    assert [len(piece) for piece in together][1] == 0
    assert "".join([*together, stream.flush()]) == tokenizer.decode(tokens)


@pytest.mark.parametrize("name", ["byte level, as Llama 3", "byte fallback, as Llama 2"])
@pytest.mark.parametrize("text", ["日本語の文", "👩‍👩‍👧 the 🙂🙂🙂", "the naïve tree 日本", "é\u0301\u200d\n\n  the"])
def test_no_piece_holds_part_of_a_character(name, text):
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text).ids
    shown = pieces(tokenizer, tokens)
    assert "".join(shown) == text
    assert not any(REPLACEMENT in piece for piece in shown)
    if name.startswith("byte level"):
        # After each token, every complete character has been returned.
        for i in range(len(tokens)):
            assert "".join(shown[: i + 1]) == tokenizer.decode(tokens[: i + 1]).rstrip(REPLACEMENT)


def test_bytes_that_begin_no_character_are_replaced_at_once():
    tokenizer = TOKENIZERS["byte level, as Llama 3"]
    no_text, letter = tokenizer.token_to_id("ÿ"), tokenizer.token_to_id("t")  # the byte 0xFF, which is in no character
    assert pieces(tokenizer, [no_text, no_text, letter]) == ["", REPLACEMENT, REPLACEMENT + "t", ""]
    assert pieces(tokenizer, [letter, no_text]) == ["t", "", REPLACEMENT]


EMOJI = "ðŁĻĤ"  # the bytes of 🙂 as a byte-level tokenizer writes them


def test_special_tokens_within_a_character_are_left_out():
    tokenizer = TOKENIZERS["byte level, as Llama 3"]
    special, letter = tokenizer.token_to_id("<eos>"), tokenizer.token_to_id("t")
    first, *rest = (tokenizer.token_to_id(byte) for byte in EMOJI)
    tokens = [first, special, special, rest[0], special, special, rest[1], special, special, rest[2], special, letter]
    assert pieces(tokenizer, tokens) == [*[""] * 9, "🙂", "", "t", ""]
    # Those of a prompt too: its last four tokens that are not special are kept.
    assert pieces(tokenizer, [rest[2], letter], [first, rest[0], rest[1], *[special] * 4]) == ["🙂", "t", ""]


def test_a_character_of_four_bytes_is_complete_before_the_next_begins():
    tokenizer = TOKENIZERS["byte level, as Llama 3"]
    letter, emoji = tokenizer.token_to_id("t"), [tokenizer.token_to_id(byte) for byte in EMOJI]
    assert pieces(tokenizer, [letter, *emoji, letter, *emoji]) == ["t", "", "", "", "🙂", "t", "", "", "", "🙂", ""]
    assert pieces(tokenizer, [letter], [letter, *emoji]) == ["t", ""]


def test_a_run_of_fallback_bytes_is_returned_after_its_last_byte():
    tokenizer = TOKENIZERS["byte fallback, as Llama 2"]
    tree, *bytes_ = (tokenizer.token_to_id(token) for token in ("▁tree", "<0xC3>", "<0xA9>", "<0xC3>"))
    assert pieces(tokenizer, [tree, *bytes_[:2], tree]) == ["tree", "", "", "é tree", ""]
    assert pieces(tokenizer, [tree, *bytes_]) == ["tree", "", "", "", REPLACEMENT * 3]


def test_a_word_after_a_prompt_begins_with_its_space():
    tokenizer = TOKENIZERS["byte fallback, as Llama 2"]
    bos, tree = tokenizer.token_to_id("<bos>"), tokenizer.token_to_id("▁tree")
    assert pieces(tokenizer, [tree, bos, tree]) == ["tree", "", " tree", ""]
    assert pieces(tokenizer, [tree], [bos, tree]) == [" tree", ""]
    assert pieces(tokenizer, [tree], [bos]) == ["tree", ""]


def test_a_run_of_bytes_may_begin_in_the_prompt():
    tokenizer = TOKENIZERS["byte fallback, as Llama 2"]
    before, after = (tokenizer.encode(text).ids[2:] for text in ("é🙂é", "é"))
    assert pieces(tokenizer, after, before) == ["", "", "é"]


def test_a_word_after_tokens_without_text_keeps_its_space():
    silent = (decoders.Replace("ee", ""), decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0))
    tokenizer = fallback(*silent)
    tree, ee = tokenizer.token_to_id("▁tree"), tokenizer.token_to_id("ee")
    assert pieces(tokenizer, [tree, *[ee] * 5, tree]) == ["tr", *[""] * 5, " tr", ""]
    assert pieces(tokenizer, [tree], [tree, *[ee] * 5]) == [" tr", ""]


@pytest.mark.parametrize("mostly_bytes", [False, True])
def test_the_work_per_token_does_not_grow_with_the_text(mostly_bytes):
    tokenizer = TOKENIZERS["byte level, as Llama 3"]
    decoded = []

    class Counted:
        id_to_token = tokenizer.id_to_token

        def decode(self, tokens):
            decoded.append(len(tokens))
            return tokenizer.decode(tokens)

    tokens = random_tokens(tokenizer, int(mostly_bytes), 2000)
    stream = TextStream(tokenizer, tokens)
    stream._tokenizer = Counted()
    assert stream.push(tokens)
    assert len(decoded) <= 2 * len(tokens) + 10
    assert max(decoded) <= 6


def test_the_example():
    assert doctest.testmod(stream) == doctest.TestResults(failed=0, attempted=5)
