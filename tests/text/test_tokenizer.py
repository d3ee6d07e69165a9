"""Tokenizers and chat templates of checkpoints: equal to the transformers library on the same files."""

import base64
import doctest
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from specsamp_jax.cli.pair import ASSETS, load_pair
from specsamp_jax.text import chat, check_vocabularies, load_tokenizer, render_chat, sandbox, tokenizer, vocabulary

FIXTURES = Path(__file__).parents[1] / "fixtures" / "text"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))
USER = [{"role": "user", "content": "the"}]


@pytest.fixture
def folder(tmp_path):
    """A copy of the byte-level tokenizer that a test may change."""
    return Path(shutil.copytree(FIXTURES / "byte_level", tmp_path / "copy"))


def configure(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return load_tokenizer(folder)


# Texts


@pytest.mark.parametrize("name", EXPECTED["texts"])
def test_texts_have_the_tokens_that_transformers_gives_them(name):
    loaded = load_tokenizer(FIXTURES / name)
    assert loaded.bos_token == loaded.tokenizer.token_to_id("<bos>")
    assert loaded.eos_token == loaded.tokenizer.token_to_id("<eos>")
    for text, tokens, decoded in EXPECTED["texts"][name]:
        assert loaded.encode(text) == tokens
        assert loaded.decode(tokens) == decoded


def test_the_trained_pair_s_tokenizer_begins_with_its_special_token():
    pair, loaded = load_pair(), load_tokenizer(ASSETS)
    assert loaded.encode("Return the") == pair.encode("Return the")
    assert loaded.bos_token == loaded.eos_token == pair.end_token


def test_the_begin_token_is_added_once(folder):
    # The post-processor in tokenizer.json adds it.
    assert configure(folder, add_bos_token=True).encode("the") == load_tokenizer(FIXTURES / "byte_level").encode("the")


def test_special_tokens_may_be_objects_or_in_a_file_of_their_own(folder):
    assert configure(folder, eos_token={"content": "<|eot_id|>", "lstrip": False}).eos_token == 284
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder).eos_token is None
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    assert load_tokenizer(folder).eos_token == 281


def test_saved_truncation_and_padding_are_ignored(folder):
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(2)
    saved.enable_padding(length=9)
    saved.save(str(folder / "tokenizer.json"))
    for text, tokens, _ in EXPECTED["texts"]["byte_level"]:
        assert load_tokenizer(folder).encode(text) == tokens


# Conversations


@pytest.mark.parametrize("name", EXPECTED["rendered"])
@pytest.mark.parametrize("case", range(len(EXPECTED["conversations"])))
def test_conversations_are_rendered_as_by_transformers(folder, name, case):
    shutil.copy(FIXTURES / "templates" / f"{name}.jinja", folder / "chat_template.jinja")
    loaded, conversation, expected = load_tokenizer(folder), EXPECTED["conversations"][case], EXPECTED["rendered"][name]
    if "refused" in expected[case]:
        with pytest.raises(ValueError, match="The chat template refuses this conversation: ") as refusal:
            loaded.encode_chat(**conversation)
        assert str(refusal.value).endswith(expected[case]["refused"])
    else:
        options = {**loaded.special_tokens, **conversation}
        assert render_chat(loaded.chat_templates["default"], **options) == expected[case]["text"]
        assert loaded.encode_chat(**conversation) == expected[case]["tokens"]


def test_templates_are_read_from_each_of_their_places(folder):
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "tools"}]
    (folder / "chat_template.json").write_text('{"chat_template": "zero"}')
    assert load_tokenizer(folder).chat_templates == {"default": "zero"}
    assert configure(folder, chat_template="one").chat_templates == {"default": "one"}
    loaded = configure(folder, chat_template=named)
    assert loaded.chat_templates == {"default": "one", "tool_use": "tools"}
    texts = [loaded.decode(loaded.encode_chat(USER, **options)) for options in ({}, {"tools": [{}]})]
    assert texts == ["one", "tools"]
    assert loaded.decode(loaded.encode_chat(USER, template="tool_use")) == "tools"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (folder / "chat_template.jinja").write_text("two")
    assert load_tokenizer(folder).chat_templates == {"default": "two", "rag": "rag"}


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='a') }}",
        "{{ render.__globals__ }}{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_a_template_can_only_return_text(template):
    with pytest.raises(ValueError, match="refuses"):
        render_chat(template, USER)


def test_calls_of_a_macro_count_as_passes(monkeypatch):
    # A million of them take half a minute; a million passes of a loop are tested above.
    for module in (chat, sandbox):
        monkeypatch.setattr(module, "MAX_LOOPS", 5000)
    template = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(N) }}"
    with pytest.raises(
        ValueError, match=re.escape("The chat template") + ".*more than 5,000 passes of loops and calls"
    ):
        render_chat(template.replace("N", "99"), USER)
    assert render_chat(template.replace("N", "9"), USER) == ""


def test_bounds_change_no_loop():
    template = "{% for x in [4, 5] %}{{ loop.index }}/{{ loop.length }}:{{ x }}{{ ',' if not loop.last }}{% endfor %}"
    template += "{% for k, v in {'a': 1}.items() %}{{ k ~ v }}{% endfor %}{% for x in [] %}{% else %};{% endfor %}"
    template += "{% for x in [[1, [2]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}"
    template += "{{ '%5d|%s' % (3, 'a') }}{{ '{:>3}'.format(1) }}{{ [3, 1]|sort|join('-') }}"
    assert render_chat(template, USER) == "1/2:4,2/2:5a1;12    3|a  11-3"


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        ("{% if %}", USER, "The chat template cannot be read: .*line 1"),
        ("{{ messages[0].content + 1 }}", USER, "The chat template refuses this conversation: .*str"),
        ("{{ messages[7].content.text }}", USER, "The chat template refuses this conversation: .*no element 7"),
        ("", [], "messages must hold at least one message"),
    ],
)
def test_a_template_that_fails_is_reported_in_a_sentence(template, messages, sentence):
    with pytest.raises(ValueError, match=sentence):
        render_chat(template, messages)


# Errors


def test_wrong_folders_and_files_are_reported(folder, tmp_path):
    with pytest.raises(ValueError, match=r"path must be a folder, but there is no .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no chat template, .* can continue a text"):
        load_tokenizer(folder).encode_chat(USER)
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be a JSON object, but it cannot be parsed"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config.json must be a JSON object, got a list"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer: "):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"must hold tokenizer.json, which is missing"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds SentencePiece's tokenizer.model: transformers.AutoTokenizer"):
        load_tokenizer(folder)


def change_tokenizer(folder, **parts):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **parts}))


def replaced(times, content="aa"):
    return {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": content}] * times,
    }


MISSING = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[X]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {},
}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
            "6 bytes holds a trie of 0 bytes",
        ),
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}},
            "holds a trie of 4294967295 bytes",
        ),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AA=="}}, "1 bytes holds a trie of 0 bytes"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "is not base64"),
        ({"normalizer": replaced(40)}, "its normalizer may make a text 1.1e+12 times longer"),
        ({"normalizer": replaced(1, "a" * 2000)}, "its normalizer may make a text 2e+03 times longer"),
        ({"post_processor": MISSING}, "its post_processor uses the special token '[X]', which it does not define"),
        ({"post_processor": {"type": "Sequence", "processors": [MISSING]}}, "uses the special token '[X]'"),
        ({"model": {"type": "Nothing"}}, "tokenizer.json is no tokenizer: "),
    ],
)
def test_a_tokenizer_that_would_panic_or_fill_the_memory_is_refused(folder, parts, sentence):
    change_tokenizer(folder, **parts)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load_tokenizer(folder)


def test_a_panic_of_the_tokenizer_becomes_an_exception(folder):
    trie = base64.b64encode((4).to_bytes(4, "little") + b"\xff\xff\xff\xff").decode()
    change_tokenizer(folder, normalizer={"type": "Precompiled", "precompiled_charsmap": trie})
    loaded = load_tokenizer(folder)
    with pytest.raises(ValueError, match="the tokenizers library failed on it: "):
        loaded.encode("the")


def test_an_unknown_token_without_a_replacement_is_reported(folder):
    change_tokenizer(folder, model={"type": "Unigram", "vocab": [], "unk_id": None})
    with pytest.raises(ValueError, match="the tokenizers library failed on it: Encountered an unknown token"):
        load_tokenizer(folder).encode("the")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"chat_template": ["a"]}, "chat_template in {} must be text, or a list of objects with name and template"),
        ({"chat_template": [{"template": "a"}]}, "chat_template in {} must be text, or a list of objects"),
        ({"chat_template": {"a": "b"}}, "chat_template in {} must be text, or a list of objects"),
        ({"eos_token": {}}, "eos_token in {} must be text, or an object with the text as content, got {{}}."),
        ({"eos_token": ["<eos>"]}, "eos_token in {} must be text, or an object with the text as content"),
        ({"bos_token": 1}, "bos_token in {} must be text, or an object with the text as content, got 1."),
        ({"add_bos_token": "yes"}, "add_bos_token in {} must be true or false, got 'yes'."),
    ],
)
def test_a_setting_of_the_wrong_type_raises_an_error(folder, values, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence.format(folder / "tokenizer_config.json"))):
        configure(folder, **values)


def test_a_file_that_is_not_regular_raises_an_error(folder):
    (folder / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match=r"chat_template.jinja must be a regular file, got a directory"):
        load_tokenizer(folder)
    (folder / "chat_template.jinja").rmdir()
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template.jinja must be text in UTF-8"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer.json must be a regular file, got a FIFO"):
        load_tokenizer(folder)


def test_a_prompt_without_tokens_is_reported(folder):
    assert load_tokenizer(folder).encode("") == [280]
    configure(folder, bos_token=None)
    saved = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**saved, "post_processor": None}))
    with pytest.raises(ValueError, match=r"The prompt '' has no token"):
        load_tokenizer(folder).encode("")
    (folder / "chat_template.jinja").write_text("")
    with pytest.raises(ValueError, match=r"The conversation has no token"):
        load_tokenizer(folder).encode_chat(USER)


def test_vocabularies_that_differ_are_reported():
    def words(*names):
        return Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, names[0]))

    check_vocabularies(words("a", "b", "c"), words("a", "b"))
    check_vocabularies(words("a", "b"), words("a", "b", "c"))
    sentence = "2 of 3 token ids differ, the first is 1, which is 'b' to the target and 'c' to the draft"
    with pytest.raises(ValueError, match=sentence):
        check_vocabularies(words("a", "b", "c"), words("a", "c", "b", "d"))


@pytest.mark.parametrize(("module", "attempted"), [(chat, 3), (tokenizer, 3), (vocabulary, 3)])
def test_the_examples(module, attempted):
    assert doctest.testmod(module) == doctest.TestResults(failed=0, attempted=attempted)
