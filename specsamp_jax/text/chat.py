"""Renders a conversation as one text with the chat template of a checkpoint."""

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser

from specsamp_jax.text.sandbox import BUDGET, MAX_LENGTH, MAX_LOOPS, BoundedEnvironment


class _Generation(ext.Extension):
    """`{% generation %}`, which marks the assistant's text for training; it is rendered as its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    # Templates come with downloaded weights.
    environment = BoundedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, ext.loopcontrols],
        filters={"tojson": _tojson},
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment.from_string(template)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> str:
    """Returns the text of a conversation under a chat template, as transformers' `apply_chat_template` does.

    The template runs in a sandbox with bounds on loops, numbers and the length of its output; see `BoundedEnvironment`.

    Args:
      template: The template, in Jinja.
      messages: Each with `role` and `content`, first to last; entries that are None are left out.
      add_generation_prompt: Whether the text ends with the beginning of the assistant's next message.
      **variables: Other variables that the template reads: the special tokens (`bos_token` and so on), `tools`, or
        switches of its own, such as `enable_thinking` of Qwen3.

    Raises:
      ValueError: There are no messages, or the template cannot be parsed, refuses them or exceeds a bound.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> template += "{% if add_generation_prompt %}<assistant>{% endif %}"
      >>> render_chat(template, [{"role": "user", "content": "Hi"}])
      '<user>Hi<assistant>'
    """
    if not messages:
        raise ValueError("messages must hold at least one message; got none.")
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = {"tools": None, "documents": None, **variables, BUDGET: [MAX_LOOPS]}
    try:
        pieces = _compile(template).generate(messages=cleaned, add_generation_prompt=add_generation_prompt, **variables)
        return _joined(pieces)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template cannot be read: {error.message}, in its line {error.lineno}.") from error
    except RecursionError:
        raise ValueError(
            "The chat template cannot be rendered: it is nested too deeply or calls itself forever."
        ) from None
    except (jinja2.TemplateError, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        reason = str(error) or type(error).__name__  # MemoryError has no text
        raise ValueError(f"The chat template refuses this conversation: {reason}") from error


def _joined(pieces: Iterator[str]) -> str:
    """The pieces of an output as one text, read no further than `MAX_LENGTH`."""
    parts, length = [], 0
    for piece in pieces:
        parts.append(piece)
        length += len(piece)
        if length > MAX_LENGTH:
            raise jinja2.TemplateError(f"its output is longer than {MAX_LENGTH:,} characters")
    return "".join(parts)
