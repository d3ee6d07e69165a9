"""Writes docs/api.md: every public name with its signature and docstring, read from the source and not imported.

python docs/make_api.py

Public are the names that `specsamp_jax` and its packages export, and what its modules without an underscore define.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "specsamp_jax"
PAGE = ROOT / "docs" / "api.md"
COMMANDS = {"cli"}  # what is used from a shell
SECTIONS = "Args|Attributes|Example|Examples|Raises|Returns|Source|Yields"

Definition = ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AnnAssign


class Name(NamedTuple):
    """A public name: where it is imported from, and what stands in the source.

    Attributes:
      module: `specsamp_jax`, or a module or package below it.
      name: Its name there.
      node: Its definition.
      doc: Its docstring, or the string below a constant.
    """

    module: str
    name: str
    node: Definition
    doc: str


def public_modules() -> list[str]:
    """`specsamp_jax`, then its public modules and packages, all with dots."""
    paths = [path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    below = sorted(path.stem for path in paths if not path.stem.startswith("_") and path.stem not in COMMANDS)
    return ["specsamp_jax", *(f"specsamp_jax.{name}" for name in below)]


def public_names(module: str) -> Iterator[Name]:
    """The public names of one module, as they stand there."""
    path = source(module)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and path.name == "__init__.py":
            for alias in node.names:
                if alias.asname == alias.name:
                    yield definition(module, alias.name, node.module or "")
        elif (name := defined(node)) and path.name != "__init__.py" and not name.startswith("_"):
            yield definition(module, name, module)


def source(module: str) -> Path:
    """The file of a module or package."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def defined(node: ast.stmt) -> str | None:
    """The name that a statement defines, if it is one of a kind that has a docstring."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return node.target.id if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else None


def definition(module: str, name: str, home: str) -> Name:
    """A name of `module` that `home` defines, with its docstring."""
    body = ast.parse(source(home).read_text(encoding="utf-8")).body
    for node, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        if defined(node) == name and isinstance(node, Definition):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                return Name(module, name, node, ast.get_docstring(node) or "")
            return Name(module, name, node, ast.get_docstring(ast.Module([following], [])) or "")
    raise ValueError(f"{home} must define {name}, which {module} exports.")


def signature(node: Definition, name: str) -> str:
    """A function's head, a class's head with its annotated fields, or a constant's value."""
    if isinstance(node, ast.FunctionDef):
        return head(node, name)
    if isinstance(node, ast.ClassDef):
        bases = [ast.unparse(base) for base in node.bases]
        lines = [f"class {name}({', '.join(bases)})" if bases else f"class {name}"]
        lines += [f"    {ast.unparse(field)}" for field in node.body if isinstance(field, ast.AnnAssign)]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                lines.append(re.sub(r"^", "    ", head(method, "__init__"), flags=re.MULTILINE))
        return "\n".join(lines)
    return ast.unparse(node)


def head(node: ast.FunctionDef, name: str) -> str:
    """`name(arguments) -> result`, on one line if it fits, else one argument a line."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = list(parts(node.args))
    line = f"{name}({', '.join(arguments)}){returns}"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){returns}"


def parts(arguments: ast.arguments) -> Iterator[str]:
    """Each argument of a signature as it is written, the marks between them among these."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + arguments.defaults
    for i, (each, default) in enumerate(zip(plain, defaults, strict=True)):
        yield one(each, default)
        if i + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg or arguments.kwonlyargs:
        yield f"*{one(arguments.vararg, None) if arguments.vararg else ''}"
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield one(each, default)
    if arguments.kwarg:
        yield f"**{one(arguments.kwarg, None)}"


def one(argument: ast.arg, default: ast.expr | None) -> str:
    """`name: annotation = default`."""
    text = ast.unparse(argument)
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if argument.annotation else f"{text}={ast.unparse(default)}"


def markdown(doc: str) -> str:
    """A Google-style docstring in Markdown: sections in bold, entries as lists, examples as code."""
    blocks = re.split(rf"^({SECTIONS}):[ ]*", doc, flags=re.MULTILINE)
    text = [blocks[0].strip()]
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = inspect.cleandoc("\n" + body) if body.startswith("\n") else body.strip()
        if title.startswith("Example"):
            text.append(f"```pycon\n{lines.strip()}\n```")
        elif title in ("Args", "Attributes", "Raises"):
            # What follows the entries without indentation is prose again.
            entries, _, rest = body.partition("\n\n")
            if not rest.startswith(" "):
                lines, rest = inspect.cleandoc("\n" + entries), rest.strip()
            else:
                rest = ""
            listed = re.sub(r"^(\*{0,2}[\w.]+): ", r"- `\1`: ", lines.strip(), flags=re.MULTILINE)
            text += [f"**{title}**\n\n{listed}", *([rest] if rest else [])]
        else:
            text.append(f"**{title}**: {lines.strip()}")
    return "\n\n".join(part for part in text if part)


def methods(node: ast.ClassDef) -> Iterator[tuple[str, str, str]]:
    """Name, head and docstring of a class's public methods and properties."""
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and (not method.name.startswith("_") or method.name == "__call__"):
            is_property = any(ast.unparse(each) == "property" for each in method.decorator_list)
            shown = f"{method.name}" if is_property else head(method, method.name)
            yield method.name, shown, ast.get_docstring(method) or ""


def page() -> str:
    """The whole page."""
    text = ["# API", "Made from the docstrings by `python docs/make_api.py`; a test holds it to them."]
    modules = {module: list(public_names(module)) for module in public_modules()}
    for module, names in modules.items():
        links = ", ".join(f"[`{name.name}`](#{module.replace('.', '-')}-{name.name})" for name in names)
        text.append(f"- **{module}**: {links}")
    for module, names in modules.items():
        text += [f"## {module}", ast.get_docstring(ast.parse(source(module).read_text(encoding="utf-8"))) or ""]
        for name in names:
            text.append(f'### <a id="{module.replace(".", "-")}-{name.name}"></a>{name.name}')
            text += [f"```python\n{signature(name.node, name.name)}\n```", markdown(name.doc)]
            if isinstance(name.node, ast.ClassDef):
                for _, shown, doc in methods(name.node):
                    text += [f"```python\n{shown}\n```", markdown(doc)]
    return "\n\n".join(part for part in text if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
