"""Docstrings of installed packages, and the files held out from the training of the trained pair.

A document is one docstring without its indentation. Its tokens begin with `END_TOKEN`, which also ends the document
before it: a prompt always begins with that token, and a model emits it at the end of a document. Whole files are held
out, not single docstrings.
"""

import ast
import hashlib
import importlib.util
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

END_TOKEN = "<|end|>"
"""The token that begins every document and ends the one before it."""

TOKENIZER_FILE = Path(__file__).parent / "assets" / "tokenizer.json"
"""The tokenizer trained on the corpus."""

# Packages that are installed inside the standard library's folder, and tests, whose docstrings are mostly fixtures.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class Docstring(NamedTuple):
    """A docstring, its file and its name."""

    path: str  # of its file, from the folder that holds the package: "numpy/linalg/_linalg.py"
    name: str  # module and definitions, dotted: "numpy.linalg._linalg.solve"
    text: str  # as `inspect.cleandoc` leaves it


def docstrings(root: Path, prefix: str, *, keep_fn: Callable[[str], bool] = lambda path: True) -> Iterator[Docstring]:
    """Yields every docstring of the modules, classes and functions under a folder, in a fixed order.

    Files are parsed and never imported. A file that Python cannot parse is skipped, and so are folders of tests.

    Args:
        root: The folder of a package, or one that holds packages.
        prefix: The start of the paths: the package's name, or "" if `root` holds packages.
        keep_fn: Returns whether to read the file at a path.

    Yields:
        The docstrings that are not empty, file by file.

    Example:
        >>> first = next(docstrings(standard_library() / "json", "json"))
        >>> first.path, first.name
        ('json/__init__.py', 'json')
    """
    for folder, subfolders, files in root.walk():
        subfolders[:] = sorted(set(subfolders) - _SKIPPED_FOLDERS)
        for file in sorted(name for name in files if name.endswith(".py")):
            path = Path(prefix, (folder / file).relative_to(root))
            if not keep_fn(path.as_posix()):
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SyntaxWarning)
                    tree = ast.parse((folder / file).read_bytes())
            except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
                continue
            parts = path.with_suffix("").parts
            for name, text in _walk(tree, ".".join(parts[:-1] if parts[-1] == "__init__" else parts)):
                yield Docstring(path.as_posix(), name, text)


def _walk(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """The docstrings at and below a node. Expressions are skipped: they hold no definitions and may nest deeply."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        # An escape sequence may write half of a surrogate pair, which UTF-8 cannot encode.
        text = (ast.get_docstring(node) or "").encode("utf-8", "ignore").decode("utf-8").strip()
        if text:
            yield name, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(child, f"{name}.{child.name}")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _walk(child, name)


def standard_library() -> Path:
    """Returns the folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def package_root(name: str) -> Path:
    """Returns the folder of an installed package, without importing it.

    Args:
        name: A top-level package, such as "numpy".

    Raises:
        ModuleNotFoundError: If no package of this name is installed, or it is a single file.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"name: expected an installed top-level package, got {name!r}")
    return Path(spec.submodule_search_locations[0])


def is_held_out(path: str) -> bool:
    """Returns whether a file is held out: 3 in 100 are, chosen by a hash of the path.

    Args:
        path: The `path` of a `Docstring`.
    """
    # With this number the held-out files of the standard library and of numpy are many and of many kinds.
    digest = hashlib.sha256(f"2072/{path}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < 3


def held_out_docstrings() -> Iterator[Docstring]:
    """Yields docstrings of the installed standard library and numpy from files that the pair was not trained on.

    If the versions differ from those of the training data, a text that has moved to another file may have been seen.
    """
    for root, prefix in ((standard_library(), ""), (package_root("numpy"), "numpy")):
        yield from docstrings(root, prefix, keep_fn=is_held_out)
