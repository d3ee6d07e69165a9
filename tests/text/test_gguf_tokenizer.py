"""Tokenizers of GGUF files against transformers' tokens (tests/fixtures/make_text_fixture.py)."""

import json
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from fixture_files import FIXTURES, values

from specsamp_jax._gguf import Header
from specsamp_jax.text import load_tokenizer
from specsamp_jax.text.gguf_tokenizer import SPLITS, build_tokenizer

KEY = "tokenizer.ggml."
CONTROL, USER_DEFINED, BYTE = 3, 4, 6


def metadata_of(name):
    """The tokenizer of a fixture as a GGUF file states it."""
    tokenizer = json.loads((FIXTURES / "text" / name / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    types = np.ones(len(tokens), np.int32)
    types[[token["id"] for token in tokenizer["added_tokens"]]] = CONTROL
    merges = tokenizer["model"]["merges"]
    metadata = {"general.architecture": "llama", f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    metadata |= {f"{KEY}bos_token_id": ids["<bos>"], f"{KEY}eos_token_id": ids["<eos>"]}
    if name == "byte_level":
        metadata |= {f"{KEY}model": "gpt2", f"{KEY}pre": "gpt-2", f"{KEY}add_bos_token": True}
        return metadata | {f"{KEY}merges": [" ".join(merge) for merge in merges]}
    types[3 : 3 + 256] = BYTE
    # A merge is better than those after it; what no merge makes comes last.
    ranks = {"".join(merge): -float(i) for i, merge in enumerate(merges)}
    scores = np.array([ranks.get(token, -1000.0) for token in tokens], np.float32)
    return metadata | {f"{KEY}model": "llama", f"{KEY}scores": scores}


def built(metadata, path="model.gguf"):
    return build_tokenizer(Header(Path(path), 0, metadata, {}))


@pytest.mark.parametrize("name", ["byte_level", "byte_fallback"])
def test_tokens_and_texts_are_those_of_transformers(name, tmp_path):
    tokenizer = load_tokenizer(gguf_files.write(tmp_path / "model.gguf", metadata_of(name)))
    for text, tokens, decoded in values("text/expected.json")["texts"][name]:
        assert tokenizer.encode(text) == tokens
        assert tokenizer.decode(tokens) == decoded
    folder = load_tokenizer(FIXTURES / "text" / name)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (folder.bos_token, folder.eos_token)
    assert tokenizer.tokenizer.get_vocab() == folder.tokenizer.get_vocab()


def test_templates_and_ends(tmp_path):
    metadata = metadata_of("byte_level")
    metadata |= {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}", f"{KEY}add_eos_token": True}
    metadata |= {"tokenizer.chat_template.tool_use": "tools"}
    tokenizer = load_tokenizer(gguf_files.write(tmp_path / "model.gguf", metadata))
    assert tokenizer.encode_chat([{"role": "user", "content": "the"}]) == [280, 261]
    assert tokenizer.chat_templates["tool_use"] == "tools"
    assert tokenizer.encode("the") == [280, 261, 281]
    metadata |= {f"{KEY}add_bos_token": False, f"{KEY}add_eos_token": False}
    tokenizer, _, _ = built(metadata)
    assert tokenizer.encode("the").ids == [261]
    with pytest.raises(ValueError, match=r"The prompt '' has no token by the tokenizer of .*model.gguf"):
        load_tokenizer(gguf_files.write(tmp_path / "model.gguf", metadata)).encode("")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gpt-2", "it's 1234 a!\n", ["it", "'s", "Ġ1234", "Ġa", "!", "Ċ"]),
        ("smollm", "a 12", ["a", "Ġ", "1", "2"]),
        ("qwen2", "it'S 12\n\n!?\n a", ["it", "'S", "Ġ", "1", "2", "ĊĊ", "!?Ċ", "Ġa"]),
        ("llama-bpe", "it'S 1234", ["it", "'S", "Ġ", "123", "4"]),
        ("tekken", "camelCase 12 A/b/\n", ["camel", "Case", "Ġ", "1", "2", "ĠA", "/b", "/Ċ"]),
    ],
)
def test_words_of_a_byte_level_bpe(name, text, words):
    tokenizer, _, _ = built(metadata_of("byte_level") | {f"{KEY}pre": name})
    assert [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)] == words


def test_what_original_tokenizers_have_beside_their_words():
    metadata = metadata_of("byte_level")
    del metadata[f"{KEY}add_bos_token"]
    begins = {name for name in SPLITS if built(metadata | {f"{KEY}pre": name})[0].encode("a").ids[0] == 280}
    assert begins == {"llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"}
    qwen = built(metadata | {f"{KEY}pre": "qwen2"})[0]
    assert qwen.encode("e\u0301").ids == qwen.encode("\u00e9").ids  # in Unicode's normal form C
    # The word is a token that no merge makes.
    metadata[f"{KEY}tokens"] = [*metadata[f"{KEY}tokens"], "xyz"]
    metadata[f"{KEY}token_type"] = np.append(metadata[f"{KEY}token_type"], 1)
    assert built(metadata | {f"{KEY}pre": "llama-bpe"})[0].encode("xyz").ids[1:] == [291]
    assert len(built(metadata | {f"{KEY}pre": "qwen2"})[0].encode("xyz").ids) == 3


def test_gemma_has_spaces_as_such_and_merges_by_id_and_no_space_before_a_text():
    pieces = ["<pad>", "<eos>", "<bos>", "\n\n", "  ", "▁", "a", "b", "ab", "▁a", "<0x0A>"]
    types = np.array([3, 3, 3, 4, 4, 1, 1, 1, 1, 1, 6], np.int32)
    # By these scores "▁a" would be made first.
    scores = np.array([0, 0, 0, 0, 0, 0, 0, 0, -5, -1, 0], np.float32)
    metadata = {f"{KEY}model": "llama", f"{KEY}tokens": pieces, f"{KEY}token_type": types, f"{KEY}scores": scores}
    metadata |= {"general.architecture": "gemma3", f"{KEY}bos_token_id": 2}
    tokenizer, _, _ = built(metadata)
    assert tokenizer.encode("ab  ab").tokens == ["<bos>", "ab", "▁▁", "ab"]
    assert tokenizer.encode("a\n\na\n").tokens == ["<bos>", "a", "\n\n", "a", "<0x0A>"]
    assert tokenizer.encode(" ab").tokens == ["<bos>", "▁", "ab"]
    assert tokenizer.decode(tokenizer.encode("a  b\n").ids) == "a  b\n"
    pieces[4] = "▁▁"
    assert built(metadata | {"general.architecture": "llama"})[0].encode("ab").tokens == ["<bos>", "▁a", "b"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": None, "tokens": None}, r"model.gguf must hold a tokenizer of the kind 'gpt2' .* got none; --to"),
        ({"model": "bert"}, "got 'bert' with 291 tokens"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens in model.gguf must be a list of texts, got"),
        ({"pre": "default"}, "tokenizer.ggml.pre in model.gguf must be one of 'gpt-2', .* got 'default'; --token"),
        ({"pre": None}, "got None; --tokenizer"),
        ({"token_type": np.ones(3, np.int32)}, "token_type in model.gguf must have 291 values, as tokens, got 3"),
        ({"merges": ["Ġ"]}, "merges in model.gguf must be two tokens each, with a space between, got 'Ġ'"),
        ({"merges": ["q zz"]}, "model.gguf holds a tokenizer that cannot be used: .*`zz` out of vocabulary"),
        ({"bos_token_id": 291}, "bos_token_id in model.gguf must be a whole number from 0 to 290, got 291"),
        ({"add_bos_token": 1}, "add_bos_token in model.gguf must be true or false, got 1"),
        ({"model": "llama"}, "model.gguf must hold tokenizer.ggml.scores, which is missing"),
        ({"model": "llama", "scores": np.ones(2, "f")}, "scores in model.gguf must have 291 values, as tokens, got 2"),
        (
            {"model": "llama", "scores": np.ones(291, "f"), "tokens": ["a" * 1001] * 291},
            "must have at most 1,000 characters each",
        ),
    ],
)  # fmt: skip
def test_a_tokenizer_that_cannot_be_built(changes, sentence):
    metadata = metadata_of("byte_level") | {KEY + key: value for key, value in changes.items()}
    with pytest.raises(ValueError, match=sentence) as error:
        built({key: value for key, value in metadata.items() if value is not None})
    assert "\n" not in str(error.value)
