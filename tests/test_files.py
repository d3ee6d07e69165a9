"""Files that others wrote: regular files of bounded size, and JSON whose settings have their types checked."""

import os
import re

import pytest

from specsamp_jax import _files
from specsamp_jax.models import load_generation_config


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: path.mkdir(), "must be a regular file, got a directory"),
        (os.mkfifo, "must be a regular file, got a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "must be a regular file, got a device"),
        (lambda path: path.symlink_to(path), "cannot be read: Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "is a link to 'nowhere', which does not exist"),
        (lambda path: path.write_bytes(b"0123456789"), "must have at most 9 bytes, got 10"),
        (lambda path: path.symlink_to("/proc/cpuinfo"), "must have at most 9 bytes, and has more"),
    ],
)
def test_only_regular_files_of_bounded_size_are_read(tmp_path, make, sentence):
    path = tmp_path / "file.json"
    make(path)
    with pytest.raises(ValueError, match=re.escape(f"{path}") + "'? " + re.escape(sentence)):
        _files.read_bytes(path, max_bytes=9)


def test_a_link_to_a_regular_file_is_read(tmp_path):
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert _files.read_text(tmp_path / "link") == "text"
    with pytest.raises(FileNotFoundError):
        _files.read_bytes(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be read: embedded null"):
        _files.read_bytes(tmp_path / "a\0b")


def test_text_must_be_utf_8(tmp_path):
    (tmp_path / "file").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(ValueError, match="file must be text in UTF-8, but byte 3 is 0xe9"):
        _files.read_text(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": NaN}', "it holds NaN, which is no number in JSON"),
        ('{"a": [-Infinity]}', "it holds -Infinity, which is no number in JSON"),
        ('{"a": 1e999}', "it holds 1e999, which is beyond the largest float"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "its values are nested too deeply"),
        ('{"a": 1' + "0" * 5000 + "}", "it cannot be parsed: Exceeds the limit"),
        ("[1]", "got a list"),
        ("\xff", "it cannot be parsed"),
    ],
    ids=str,
)
def test_what_is_not_a_json_object(tmp_path, text, sentence):
    file = tmp_path / "config.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape(f"{file} must be a JSON object") + ".*" + re.escape(sentence)):
        _files.read_json(file)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (_files.TEXT, ["", "a"], [1, ["a"], {}, True]),
        (_files.TEXT_LIST, [[], ["a"]], ["a", [1], [["a"]], {}]),
        (_files.BOOLEAN, [True, False], [0, 1, "true"]),
        (_files.OBJECT, [{}], [[], "a", 1]),
        (_files.whole_number(0, 9), [0, 9], [-1, 10, 1.0, True, "1", 10**400]),
        (_files.number(0), [0, 0.5, 10**300], [-0.1, 10**400, True, "1", [1], float("nan"), float("inf")]),
        (_files.number(0, 1), [0, 1, 0.5], [1.5, 2]),
    ],
)
def test_settings_have_the_types_and_ranges_asked_for(tmp_path, kind, good, bad):
    for value in good:
        assert _files.read_setting({"a": value}, "a", kind, source=tmp_path) == value
    for value in bad:
        with pytest.raises(ValueError, match=re.escape(f"a in {tmp_path} must be {kind.words}, got ")) as refusal:
            _files.read_setting({"a": value}, "a", kind, source=tmp_path)
        assert len(str(refusal.value)) < len(str(tmp_path)) + 200
    for values in ({}, {"a": None}):
        assert _files.read_setting(values, "a", kind, source=tmp_path, default=7) == 7


def test_an_optional_file_that_is_a_broken_link_is_not_taken_for_missing(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert _files.read_json(tmp_path / "generation_config.json", required=False) == {}
    (tmp_path / "generation_config.json").symlink_to("blob")
    with pytest.raises(ValueError, match="is a link to 'blob', which does not exist"):
        _files.read_json(tmp_path / "generation_config.json", required=False)
    with pytest.raises(ValueError, match="is a link to 'blob', which does not exist"):
        load_generation_config(tmp_path)
