"""Result files, one line per row, and tables in Markdown."""

import functools
import json
import pathlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], left: Collection[int] = (0,)) -> Iterator[str]:
    """Yields the lines of a Markdown table; columns with an index in `left` are aligned to the left, others right."""

    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    yield line(header)
    yield "|" + "".join("---|" if i in left else "---:|" for i in range(len(header)))
    yield from map(line, rows)


def write(path: str | pathlib.Path, about: dict[str, Any], rows: list[Any]) -> None:
    """Writes `{"about": about, "rows": rows}`, one line per row, without spaces."""
    dump = functools.partial(json.dumps, separators=(",", ":"))
    lines = ",\n".join(map(dump, rows))
    pathlib.Path(path).write_text(f'{{"about":{dump(about)},\n"rows":[\n{lines}\n]}}\n')


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Reads what `write` wrote."""
    contents = json.loads(pathlib.Path(path).read_text())
    return contents["about"], contents["rows"]
