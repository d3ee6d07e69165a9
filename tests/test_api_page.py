"""docs/api.md is what the docstrings say, and they leave no public name out."""

import ast
import doctest
import importlib.util
import inspect
from pathlib import Path

import pytest

import specsamp_jax as ss
from specsamp_jax import _decode, _step, pair
from specsamp_jax.models import vocab

SCRIPT = Path(__file__).parents[1] / "docs" / "make_api.py"


@pytest.fixture(scope="module")
def make_api():
    spec = importlib.util.spec_from_file_location("make_api", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def names(make_api):
    return [name for module in make_api.public_modules() for name in make_api.public_names(module)]


def test_the_page_is_up_to_date(make_api):
    assert make_api.PAGE.read_text(encoding="utf-8") == make_api.page(), "run python docs/make_api.py"


def test_the_page_holds_every_public_name(make_api, names):
    page = make_api.PAGE.read_text(encoding="utf-8")
    found = {name.name for name in names if name.module == "specsamp_jax"}
    assert found == {name for name in dir(ss) if not name.startswith("_") and not inspect.ismodule(getattr(ss, name))}
    modules = {name.module for name in names}
    assert modules >= {f"specsamp_jax{rest}" for rest in ("", ".models", ".text", ".train", ".pair")}
    assert not any("cli" in module for module in modules)
    for name in names:
        assert f'<a id="{name.module.replace(".", "-")}-{name.name}"></a>{name.name}\n' in page


def test_every_public_name_has_a_docstring(make_api, names):
    missing = [f"{name.module}.{name.name}" for name in names if not name.doc]
    for name in names:
        if isinstance(name.node, ast.ClassDef):
            missing += [f"{name.name}.{method}" for method, _, doc in make_api.methods(name.node) if not doc]
    assert not missing


def test_every_function_of_the_first_modules_has_an_example(names):
    modules = {"specsamp_jax", "specsamp_jax.text", "specsamp_jax.pair"}
    functions = [name for name in names if name.module in modules and isinstance(name.node, ast.FunctionDef)]
    assert [name.name for name in functions if ">>> " not in name.doc] == []


@pytest.mark.parametrize("module", [_decode, _step, pair, vocab], ids=lambda module: module.__name__)
def test_the_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_sections_lists_and_long_signatures(make_api):
    doc = "First.\n\nArgs:\n  one: What\n    it is.\n  **two: More.\n\nProse.\n\nExample:\n  >>> 1\n  1"
    assert make_api.markdown(doc) == (
        "First.\n\n**Args**\n\n- `one`: What\n  it is.\n- `**two`: More.\n\nProse.\n\n```pycon\n>>> 1\n1\n```"
    )
    (node,) = ast.parse("def f(a, /, b: int = 1, *rest: str, c=2, **others) -> None: ...").body
    assert make_api.head(node, "f") == "f(a, /, b: int = 1, *rest: str, c=2, **others) -> None"
    (node,) = ast.parse(f"def f(a, b: int = 1, *, {'c' * 90}: str = 'x') -> None: ...").body
    long = "c" * 90
    assert make_api.head(node, "f") == f"f(\n    a,\n    b: int = 1,\n    *,\n    {long}: str = 'x',\n) -> None"
