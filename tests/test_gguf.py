"""Headers of GGUF files: what they hold, and files that are cut off or lie."""

import struct

import gguf_files
import numpy as np
import pytest

from specsamp_jax._files import TEXT
from specsamp_jax._gguf import is_gguf, read_gguf

SETTINGS = {
    "general.architecture": "llama",
    "number": 7,
    "share": 0.5,
    "switch": True,
    "tokens": ["a", "", "日本"],
    "types": np.array([1, 3], np.int32),
}
TENSORS = {"token_embd.weight": np.arange(12, dtype=np.float32).reshape(3, 4), "norm": np.ones(5, np.float16)}


@pytest.fixture
def file(tmp_path):
    return gguf_files.write(tmp_path / "model.gguf", SETTINGS, TENSORS)


def damaged(file, old, new):
    content = file.read_bytes()
    assert content.count(old) == 1
    file.write_bytes(content.replace(old, new))
    with pytest.raises(ValueError, match=file.name) as error:
        read_gguf(file)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_metadata_and_places_of_tensors(file):
    header = read_gguf(file)
    assert {key: header.metadata[key] for key in list(SETTINGS)[:5]} == {
        key: SETTINGS[key] for key in list(SETTINGS)[:5]
    }
    np.testing.assert_array_equal(header.metadata["types"], [1, 3])
    for name, values in TENSORS.items():
        assert header.tensors[name].shape == values.shape
        place = header.tensors[name].start
        assert place % 32 == 0
        assert file.read_bytes()[place : place + values.nbytes] == values.tobytes()
    with pytest.raises(ValueError, match=r"number in .*model.gguf must be text, got 7"):
        header.setting("number", TEXT)


def test_a_file_that_changed_is_read_anew(file):
    assert read_gguf(file) is read_gguf(file)
    gguf_files.write(file, {**SETTINGS, "number": 8, "more": 1}, TENSORS)
    assert read_gguf(file).metadata["number"] == 8


def test_by_its_name_or_its_first_bytes(file, tmp_path):
    assert is_gguf(file)
    assert is_gguf(file.rename(tmp_path / "weights"))
    (tmp_path / "text").write_text("text")
    assert not is_gguf(tmp_path / "text")
    (tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(tmp_path / "folder.gguf")
    assert not is_gguf(tmp_path / "nowhere.gguf")


def test_wherever_it_is_cut_off_there_is_one_sentence(file):
    content = file.read_bytes()
    for length in range(4, content.index(b"norm") + 28, 3):  # the header ends there
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"model.gguf") as error:
            read_gguf(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"GGUF\x03", b"PKzz\x03", "must be a GGUF file, but it begins with b'PKzz'."),
        (b"GGUF\x03\0\0\0", b"GGUF\x01\0\0\0", "must be a GGUF file of version 2 or 3, got 1."),
        (b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03", "with the bytes of each number reversed."),
        (b"\x03\0\0\0\x02" + bytes(7), b"\x03\0\0\0" + b"\xff" * 7 + b"\x0f", "tensors, more than fit in it."),
        (b"\x06" + bytes(7) + b"\x14", b"\xff" * 8 + b"\x14", "settings, more than fit in it."),
        (b"\x06" + bytes(7) + b"number", b"\xff" * 8 + b"number", "is cut off or damaged: 'the name of a setting'"),
        (b"tokens\x09\0\0\0\x08\0\0\0\x03", b"tokens\x09\0\0\0\x08\0\0\0\xff", "it states 255 texts of tokens, more"),
        (b"types\x09\0\0\0\x05\0\0\0\x02", b"types\x09\0\0\0\x0a\0\0\0\xff", "it states 255 numbers of types, more"),
        (b"types\x09\0\0\0\x05", b"types\x09\0\0\0\x09", "a text or an array of one of them; got the type 9 of 9."),
        (b"switch\x07", b"switch\x63", "got the type 99."),
        (b"number\x04", b"switch\x04", "must hold 'switch' once, and holds it twice."),
        ("日".encode(), b"\xff\xff\xff", "'tokens' in"),
        (b"norm\x01", b"norm\x05", "with 5 dimensions."),
    ],
)  # fmt: skip
def test_a_header_that_lies(file, old, new, sentence):
    assert sentence in damaged(file, old, new)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"split.count": 3}, "is one of 3 parts of a model; `llama-gguf-split --merge` joins them."),
        ({"general.alignment": 0}, "general.alignment in .* must be from 1 to 1048576, got 0."),
        ({"general.alignment": "x"}, "general.alignment in .* must be from 1 to 1048576, got 'x'."),
    ],
)
def test_settings_of_the_format(file, changes, sentence):
    gguf_files.write(file, {**SETTINGS, **changes}, TENSORS)
    with pytest.raises(ValueError, match=sentence):
        read_gguf(file)


def test_a_long_text_is_not_taken_into_memory(file):
    with file.open("r+b") as large:  # a sparse file
        large.seek(24)
        large.write(struct.pack("<Q", 1 << 40))
        large.truncate(1 << 41)
    with pytest.raises(ValueError, match="ends at byte 1,099,511,627,808, and a header may have 134,217,728"):
        read_gguf(file)
