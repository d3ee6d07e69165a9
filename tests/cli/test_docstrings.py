import itertools
import json
import sys

import corpus
import pytest
from tokenizers import Tokenizer

from specsamp_jax.cli import docstrings as reader

SOURCE = '''"""The module.

    Indented.
"""
print("\\d")  # an escape that Python warns of


class Outer:
    """A class."""

    def method(self):
        """A method.

        Args:
            self: It.
        """
        def inner():
            """A nested function."""

    if True:
        async def conditional(self):
            """In a branch."""

    def without(self):
        pass


try:
    pass
except ValueError:
    def handler():
        """In a handler, with half of a pair: \\ud800."""


def empty():
    """   """
'''


@pytest.fixture
def package(tmp_path):
    root = tmp_path / "package"
    for path, text in {
        "__init__.py": '"""The package."""',
        "sub/module.py": SOURCE,
        "sub/broken.py": "def f(:",
        "sub/null.py": '"""Null."""\0',
        "sub/latin.py": '# coding: latin-1\n"""Caf\xe9."""',
        "sub/notes.txt": '"""No code."""',
        "another/module.py": '"""Another module."""',
        "tests/test_it.py": '"""A test."""',
        "site-packages/other/__init__.py": '"""Another package."""',
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, "latin-1")
    return root


def document(text, path="a.py"):
    return reader.Docstring(path, "a", text)


def words(start, stop):
    return " ".join(f"w{i}" for i in range(start, stop))


def test_docstrings_finds_modules_classes_and_functions(package):
    found = list(reader.docstrings(package, "package"))
    module = "package.sub.module"
    assert found == [
        ("package/__init__.py", "package", "The package."),
        ("package/another/module.py", "package.another.module", "Another module."),
        ("package/sub/latin.py", "package.sub.latin", "Caf\xe9."),
        ("package/sub/module.py", module, "The module.\n\nIndented."),
        ("package/sub/module.py", f"{module}.Outer", "A class."),
        ("package/sub/module.py", f"{module}.Outer.method", "A method.\n\nArgs:\n    self: It."),
        ("package/sub/module.py", f"{module}.Outer.method.inner", "A nested function."),
        ("package/sub/module.py", f"{module}.Outer.conditional", "In a branch."),
        ("package/sub/module.py", f"{module}.handler", "In a handler, with half of a pair: ."),
    ]


def test_docstrings_paths_do_not_depend_on_where_the_package_is(package):
    assert list(reader.docstrings(package.parent, "")) == list(reader.docstrings(package, "package"))


def test_docstrings_reads_what_it_is_told_to(package):
    found = reader.docstrings(package, "package", keep_fn=lambda path: path == "package/sub/latin.py")
    assert [each.text for each in found] == ["Caf\xe9."]


def test_package_root_imports_nothing(package, monkeypatch):
    (package / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(package.parent)
    assert reader.package_root("package") == package
    assert "package" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match="'no_such_package'"):
        reader.package_root("no_such_package")
    with pytest.raises(ModuleNotFoundError, match="'ast'"):
        reader.package_root("ast")


def test_split_is_of_files_and_never_changes():
    # Written down, not computed: with another split, a shipped pair would be shown what it was trained on.
    held_out = ["numpy/polynomial/_polybase.py", "numpy/lib/_scimath_impl.py", "subprocess.py", "codecs.py"]
    trained = ["numpy/linalg/_linalg.py", "numpy/__init__.py", "json/__init__.py", "random.py"]
    assert all(map(reader.is_held_out, held_out))
    assert not any(map(reader.is_held_out, trained))


def test_split_holds_out_three_in_a_hundred():
    count = sum(reader.is_held_out(f"package/module_{i}.py") for i in range(20_000))
    # Binomial(20000, 0.03): 600, standard deviation 24.
    assert abs(count - 600) < 5 * 24


def test_without_duplicates_keeps_the_first():
    documents = [document("x", "a.py"), document("y", "b.py"), document("x", "c.py")]
    assert list(corpus.without_duplicates(documents)) == documents[:2]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"before {words(10, 30)} after", False),  # exactly 20 words of it, inside
        (f"before {words(10, 29)} after", True),  # 19
        (words(20, 40), False),  # the last 20
        (words(0, 20).replace(" ", "\n    "), False),  # otherwise indented
        (words(0, 10), True),  # short, and only a part
        ("The short one.", False),  # short, and the whole
        ("The  short\none.", False),
        (f"The short one. {words(100, 140)}", True),  # a short document is no passage of a long one
    ],
)
def test_without_overlap_drops_what_quotes_the_held_out(text, kept):
    held_out = [document(words(0, 40)), document("The short one.")]
    assert list(corpus.without_overlap([document(text)], held_out)) == [document(text)] * kept


def test_held_out_docstrings_are_of_both_and_only_held_out():
    found = list(reader.held_out_docstrings())
    assert all(reader.is_held_out(each.path) for each in found)
    numpy = [each for each in found if each.path.startswith("numpy/")]
    assert len(numpy) > 20
    assert len(found) - len(numpy) > 20
    assert any(each.name.startswith("subprocess.") for each in found)
    assert not any("site-packages" in each.path or "/tests/" in each.path for each in found)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(reader.TOKENIZER_FILE))


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading, trailing \n",
        "Parameters\n----------\na : array_like\n        Indented.\n\n\n\tTab.\r\n\r\n  \n",
        "naïve e\u0301 Ελληνικά 日本語 👩‍👩‍👧 \u202e\ufeff\u00a0\u2028 \U0010ffff",
        "".join(map(chr, range(0x250))),
        "1234567 x**2 ¼ ٣",
    ],
)
def test_tokenizer_gives_back_every_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_gives_back_every_character(tokenizer):
    # Half of a surrogate pair is no character.
    points = itertools.chain(range(0xD800), range(0xE000, 0x110000, 7))
    text = "".join(map(chr, points))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_vocabulary(tokenizer):
    assert tokenizer.get_vocab_size() == 4096
    assert tokenizer.token_to_id(reader.END_TOKEN) == 0
    assert 0 not in tokenizer.encode("the end").ids
    vocabulary = json.loads(reader.TOKENIZER_FILE.read_text())["model"]["vocab"]
    assert sum(len(token) == 1 for token in vocabulary) == 256


def test_tokenizer_takes_a_line_break_and_its_indentation_as_one_token(tokenizer):
    assert len(tokenizer.encode("\n        the").ids) == 2


def test_tokenizer_asset_is_small():
    assert reader.TOKENIZER_FILE.stat().st_size < 400_000
