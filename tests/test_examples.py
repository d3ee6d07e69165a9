"""The examples of the docstrings run, and every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import specsamp_jax as ss
from specsamp_jax import text
from specsamp_jax.cli import pair

MODULES = sorted(module.name for module in pkgutil.walk_packages(ss.__path__, "specsamp_jax."))
SHOWN = [ss, text, pair]


def public(module):
    """Functions and classes that a module exports, with their names."""
    for name, value in vars(module).items():
        defined = getattr(value, "__module__", "")
        ours = defined.startswith("specsamp_jax") if hasattr(module, "__path__") else defined == module.__name__
        if ours and not name.startswith("_") and (inspect.isfunction(value) or inspect.isclass(value)):
            yield name, value


@pytest.mark.optimised(False)
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("module", SHOWN, ids=lambda module: module.__name__)
def test_every_public_function_has_an_example(module):
    functions = [(name, fn) for name, fn in public(module) if inspect.isfunction(fn)]
    assert functions
    assert [name for name, fn in functions if ">>> " not in (fn.__doc__ or "")] == []


@pytest.mark.parametrize("name", ["specsamp_jax", *MODULES])
def test_every_public_name_has_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__
    assert [name for name, value in public(module) if not value.__doc__] == []
