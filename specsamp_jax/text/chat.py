"""A conversation as one text, by the template that a checkpoint brings along."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import ext, nodes, parser, sandbox


class _Generation(ext.Extension):
    """`{% generation %}` marks what an assistant said, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter writes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache
def _compile(template: str) -> jinja2.Template:
    # Templates come with downloaded weights, so they run in a sandbox and cannot change what they are given.
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
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
    """Returns the text that a chat template makes of a conversation, as transformers' `apply_chat_template` does.

    Args:
      template: The template, in Jinja.
      messages: Each with `role` and `content`, first to last; entries that are None are left out.
      add_generation_prompt: Whether the text ends with the beginning of the assistant's next message.
      **variables: What else the template may read: the special tokens (`bos_token` and so on), `tools`, or its own
        switches, such as `enable_thinking` of Qwen3.

    Raises:
      ValueError: There are no messages, or the template cannot be read or refuses them.

    Example:
      >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      >>> template += "{% if add_generation_prompt %}<assistant>{% endif %}"
      >>> render_chat(template, [{"role": "user", "content": "Hi"}])
      '<user>Hi<assistant>'
    """
    if not messages:
        raise ValueError("messages must hold at least one message; got none.")
    said = [{key: value for key, value in message.items() if value is not None} for message in messages]
    variables = {"tools": None, "documents": None, **variables}
    try:
        return _compile(template).render(messages=said, add_generation_prompt=add_generation_prompt, **variables)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(f"The chat template cannot be read: {error.message}, in its line {error.lineno}.") from error
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"The chat template refuses this conversation: {error}") from error
