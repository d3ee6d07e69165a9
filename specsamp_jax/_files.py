"""Reading files that others wrote: regular files of bounded size, JSON, and its settings with their types checked."""

import json
import math
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAX_BYTES = 1 << 28
"""The largest file that is read whole, 256 MiB; the largest tokenizer.json published has about 35 MB."""


def check_file(path: Path, *, max_bytes: int | None = None) -> int:
    """Returns the size in bytes of a regular file; a link counts as the file that it leads to.

    Files are opened only after this check: a FIFO would block, and a link to /dev/zero has no end.

    Args:
      path: The file.
      max_bytes: The largest size allowed. None: any.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is no regular file, is too large, cannot be looked at, or is a link to a file that does not exist.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        # An optional file is not missing if its name is there, as in a cache of links that was downloaded in part.
        if path.is_symlink():
            raise ValueError(f"{path} is a link to {str(path.readlink())!r}, which does not exist.") from None
        raise
    except (OSError, ValueError) as error:  # ValueError: the name holds a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{str(path)!r} cannot be read: {reason}.") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} must be a regular file, got a {_file_kind(status.st_mode)}.")
    if max_bytes is not None and status.st_size > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes:,} bytes, got {status.st_size:,}.")
    return status.st_size


def check_folder(path: Path, name: str) -> None:
    """Raises ValueError if `path` is not a folder that is there; `name` is the argument, for the error."""
    if not path.is_dir():
        why = f"got the file {path}" if path.exists() else f"but there is no {path}"
        raise ValueError(f"{name} must be a folder, {why}.")


def read_bytes(path: Path, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Returns the content of a regular file.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: See `check_file`; or it cannot be read.
    """
    check_file(path, max_bytes=max_bytes)
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error
    if len(content) > max_bytes:  # files of /proc have the size 0
        raise ValueError(f"{path} must have at most {max_bytes:,} bytes, and has more.")
    return content


def read_text(path: Path, *, max_bytes: int = MAX_BYTES) -> str:
    """Returns the text of a regular file in UTF-8; raises as `read_bytes` does, and ValueError if it is not UTF-8."""
    return decode(read_bytes(path, max_bytes=max_bytes), str(path))


def decode(content: bytes, source: str) -> str:
    """Returns UTF-8 as text; `source` names it in the ValueError that other bytes raise."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} must be text in UTF-8, but byte {error.start} is {content[error.start]:#04x}: {error.reason}."
        ) from error


def read_json(path: Path, *, holder: str = "A checkpoint", required: bool = True) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      path: The file, in UTF-8.
      holder: The owner of such a file, for the error about a missing one.
      required: Whether the file must exist. If not, a missing file is read as `{}`.

    Raises:
      ValueError: The file is missing though it is required, is no regular file, or is not a JSON object. Numbers
        that JSON does not have (NaN, Infinity, 1e999) are refused.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        if not required:
            return {}
        raise ValueError(f"{holder} must hold {path.name}, but there is no {path}.") from None
    try:
        values = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError(f"{path} must be a JSON object, but its values are nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{path} must be a JSON object, but it cannot be parsed: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, got a {type(values).__name__}.")
    return values


class Kind(NamedTuple):
    """The values that a setting may have.

    Attributes:
      words: The values in words, after "must be".
      accepts: Whether a value is one of them.
    """

    words: str
    accepts: Callable[[Any], bool]


def read_setting(values: Mapping[str, Any], name: str, kind: Kind, *, source: Path, default: Any = None) -> Any:
    """Returns one setting of a JSON object with its type checked, or `default` if it is missing or null.

    Args:
      values: The object, from `read_json`.
      name: The setting.
      kind: The values allowed.
      source: The file, for the error.
      default: The value of a missing setting; not checked.

    Raises:
      ValueError: The setting has another value.
    """
    value = values.get(name)
    if value is None:
        return default
    if not kind.accepts(value):
        raise ValueError(f"{name} in {source} must be {kind.words}, got {brief(value)}.")
    return value


def brief(value: Any) -> str:
    """Returns a value for an error message, cut after 80 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of more than 4,300 digits
        text = f"a {type(value).__name__} that is too large to be shown"
    return text if len(text) <= 80 else text[:80] + "..."


def whole_number(low: int, high: int = 2**31 - 1) -> Kind:
    """Returns the integers from `low` to `high`."""
    words = f"a whole number from {low} to {high}"
    return Kind(words, lambda value: type(value) is int and low <= value <= high)


def number(low: int | float, high: int | float = math.inf) -> Kind:
    """Returns the finite numbers from `low` to `high`."""
    largest = min(high, 1.7e308)
    words = f"a number of at least {low:g}" if high == math.inf else f"a number from {low:g} to {high:g}"
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= largest)


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


TEXT = Kind("text", lambda value: isinstance(value, str))
TEXT_LIST = Kind("a list of texts", _is_text_list)
BOOLEAN = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("a JSON object", lambda value: isinstance(value, dict))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is no number in JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:20]}, which is beyond the largest float")
    return value


def _file_kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "directory"), (stat.S_ISFIFO, "FIFO"), (stat.S_ISSOCK, "socket"))
    return next((name for check_fn, name in kinds if check_fn(mode)), "device")


def check_format(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises ValueError if a folder holds weights in a format of other programs: quantized, or of CTranslate2.

    Args:
      folder: The folder.
      config: Its config.json.
    """
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        by = f" by {brief(method)}" if method else ""
        raise ValueError(
            f"{folder} holds quantized weights{by}, which cannot be loaded; use the folder of the same model without "
            "quantization."
        )
    if "model_type" not in config and (folder / "model.bin").exists() and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} looks like a model that was converted for CTranslate2 (model.bin), which cannot be loaded; "
            "use the folder in Hugging Face's layout from which it was converted."
        )
