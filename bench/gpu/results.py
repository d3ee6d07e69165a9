"""Result files of the GPU scripts: one line per row."""

import functools
import json
import pathlib
from typing import Any


def write(path: str | pathlib.Path, about: dict[str, Any], rows: list[Any]) -> None:
    """Writes `{"about": about, "rows": rows}`, one line per row, without spaces."""
    dump = functools.partial(json.dumps, separators=(",", ":"))
    lines = ",\n".join(map(dump, rows))
    pathlib.Path(path).write_text(f'{{"about":{dump(about)},\n"rows":[\n{lines}\n]}}\n')


def read(path: str | pathlib.Path) -> tuple[dict[str, Any], list[Any]]:
    """Reads what `write` wrote."""
    contents = json.loads(pathlib.Path(path).read_text())
    return contents["about"], contents["rows"]
