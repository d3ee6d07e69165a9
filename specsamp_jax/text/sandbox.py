"""A Jinja environment for chat templates of unknown origin: no access to Python, and bounded loops, texts and numbers.

The bounds are far above what a conversation needs. They stop a template from filling the memory or looping for hours;
they do not bound the time of each operation. See docs/guides/trust.md.
"""

import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import jinja2
from jinja2 import nodes, runtime, sandbox, visitor

MAX_LENGTH = 4_000_000
"""Longest text, list or output: above a million tokens."""

MAX_LOOPS = 1_000_000
"""Most passes of loops and calls of functions in one rendering."""

MAX_NUMBER = 1_000_000
"""Largest number that a function, filter or format takes, as a width or a count."""

BUDGET = "loops left"
"""Name of the counter among a template's variables; no template can spell a name with a space."""

_MAX_BITS = 4096
_FORMAT_WIDTH = re.compile(r"%[^a-zA-Z%]*?(?:\d{7,}|\*)")
_BRACE_WIDTH = re.compile(r"\{[^}]*:[^}]*\d{7,}")


class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox in which templates change no argument, and loops, texts and numbers are bounded."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], **options: Any):
        super().__init__(**options)
        del self.globals["lipsum"]  # writes random text of any length
        own = {**self.filters, **filters}
        self.filters = {name: _bounded_filter(name, function) for name, function in own.items()}
        self.filters |= {"bounded": bounded, "counted": _counted}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Returns the result of an operator, if it is not too large."""
        if operator == "%" and isinstance(left, str):
            _check_format(left)
            _check_length(left.count("%") * _longest(right))
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, Sequence) and isinstance(times, int):
                    _check_length(len(value) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise jinja2.TemplateError(f"a number of more than {_MAX_BITS} bits")
        return bounded(super().call_binop(context, operator, left, right))

    def call(self, context: runtime.Context, function: Any, *arguments: Any, **options: Any) -> Any:
        """Returns the result of a function or macro, if neither its arguments nor the result are too large."""
        _spend(context)
        if isinstance(function, runtime.LoopContext):  # a recursive loop over `arguments[0]`
            arguments = (_counted(context, arguments[0]), *arguments[1:])
        elif function is not self.globals["range"]:  # which has a bound of its own
            _check_arguments(arguments, options)
            if isinstance(function, types.BuiltinMethodType) and isinstance(function.__self__, str):
                _check_growth(function.__name__, function.__self__, arguments)
        return bounded(super().call(context, function, *arguments, **options))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Returns what replaces `str.format` of a text, after a check of the text's widths."""
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None
        text = value.__self__
        _check_format(text)

        @functools.wraps(wrapper)
        def checked(*arguments: Any, **options: Any) -> str:
            _check_length(text.count("{") * _longest(*arguments, options))
            return wrapper(*arguments, **options)

        return checked


def bounded(value: Any) -> Any:
    """Returns `value`; raises TemplateError if it is a text or collection beyond `MAX_LENGTH`."""
    if isinstance(value, str | bytes | list | tuple | dict | set):
        _check_length(len(value))
    return value


class _Bounds(visitor.NodeTransformer):
    """Puts a filter around everything in a template that Jinja evaluates without asking its environment."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, "bounded")

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:  # noqa: N802
        self.generic_visit(node)
        node.filter = _filtered(node.filter, "bounded")
        return node


def _filtered(node: nodes.Node | None, name: str) -> nodes.Filter:
    return nodes.Filter(cast(Any, node), name, [], [], None, None, lineno=1 if node is None else node.lineno)


@jinja2.pass_context
def _counted(context: runtime.Context, items: Iterable[Any]) -> Iterator[Any]:
    for item in items:
        _spend(context)
        yield item


def _spend(context: runtime.Context) -> None:
    budget = context.parent[BUDGET]
    budget[0] -= 1
    if budget[0] < 0:
        raise jinja2.TemplateError(f"more than {MAX_LOOPS:,} passes of loops and calls")


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passes_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        value, *rest = arguments[1:] if passes_context else arguments
        _check_arguments(rest, options)
        if name == "format":
            _check_format(str(value))
            _check_length(str(value).count("%") * _longest(*rest, options))
        elif name == "join":
            # What a generator yields cannot be measured before it is read.
            items = value if isinstance(value, Sequence | Mapping) else _read(value)
            arguments = (*arguments[:1], items, *rest) if passes_context else (items, *rest)
            _check_growth("join", str((*rest, *options.values(), "")[0]), (items,))
        elif name in ("replace", "indent"):
            _check_growth(name, str(value), (*rest, *options.values()))
        return bounded(function(*arguments, **options))

    return wrapper


def _check_growth(name: str, text: str, arguments: Sequence[Any]) -> None:
    """Checks operations of a text whose result may be far longer than all that they take, before they run."""
    if name == "join" and arguments and isinstance(arguments[0], Sequence | Mapping):
        items = arguments[0]
        _check_length(len(text) * len(items) + sum(len(item) for item in items if isinstance(item, str)))
    elif name == "replace" and len(arguments) >= 2 and isinstance(arguments[0], str):
        _check_length(text.count(arguments[0]) * len(str(arguments[1])))
    elif name == "indent" and arguments:
        width = arguments[0]
        _check_length((text.count("\n") + 1) * (len(width) if isinstance(width, str) else int(width)))
    elif name == "expandtabs":
        _check_length(text.count("\t") * int(arguments[0] if arguments else 8))


def _read(items: Iterable[Any]) -> list[Any]:
    """The items as a list, whose texts together are not too long."""
    found, length = [], 0
    for item in items:
        length += len(item) if isinstance(item, str) else 1
        _check_length(length)
        found.append(item)
    return found


def _longest(*values: Any) -> int:
    """The length of the longest text among values, and within those that are collections."""
    texts = [value for value in values if isinstance(value, str)]
    for value in values:
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        texts += [text for text in inside if isinstance(text, str)]
    return max(map(len, texts), default=0)


def _check_arguments(arguments: Iterable[Any], options: Mapping[str, Any]) -> None:
    for value in (*arguments, *options.values()):
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise jinja2.TemplateError(f"an argument beyond {MAX_NUMBER:,}")


def _check_format(text: str) -> None:
    if _FORMAT_WIDTH.search(text) or _BRACE_WIDTH.search(text):
        raise jinja2.TemplateError(f"a format with a width beyond {MAX_NUMBER:,} or from an argument")


def _check_length(length: int) -> None:
    if length > MAX_LENGTH:
        raise jinja2.TemplateError(f"a text or list longer than {MAX_LENGTH:,}")
