"""Reading the small files of a checkpoint's folder."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path, *, holder: str = "A checkpoint", required: bool = True) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: The file, in UTF-8.
      holder: What must hold such a file, for the error where there is none.
      required: Whether there must be one; else a missing file says nothing, `{}`.

    Raises:
      ValueError: The file is missing though it is required, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise ValueError(f"{holder} must hold {path.name}, but there is no {path}.") from None
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object, but it cannot be parsed: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(values).__name__}.")
    return values
