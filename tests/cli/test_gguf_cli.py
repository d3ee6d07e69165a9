"""The commands with a GGUF file in place of a folder."""

import json

import gguf_files
import numpy as np
import pytest

from specsamp_jax.cli import folders, generation
from specsamp_jax.cli.pair import ASSETS

pytest.importorskip("gguf")
KEY = "tokenizer.ggml."


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The drafter of the trained pair, with the pair's tokens."""
    model = json.loads((ASSETS / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    types = np.where(np.arange(len(tokens)) == 0, 3, 1).astype(np.int32)
    settings = {f"{KEY}model": "gpt2", f"{KEY}pre": "llama-bpe", f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    settings |= {f"{KEY}merges": [" ".join(merge) for merge in model["merges"]]}
    settings |= {f"{KEY}bos_token_id": 0, f"{KEY}eos_token_id": 0, "general.sampling.top_k": 20}
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return gguf_files.convert(ASSETS / "drafter", path, lambda name, values: values.astype("float32"), **settings)


def test_target_and_drafter(file):
    setup = generation.load(file, str(file), None, dtype="float32")
    folder = generation.load(ASSETS / "target", str(ASSETS / "drafter"), ASSETS, dtype="float32")
    assert setup.tokenizer.encode("Return the") == folder.tokenizer.encode("Return the") == [0, 843, 269]
    assert setup.config.eos_token == (0,)
    assert (setup.max_length, setup.num_heads) == (folder.max_length, folder.num_heads[1:] * 2)
    assert setup.notes == [f"{file} recommends top_k = 20, which is not applied: give the options that you want"]
    leaves = setup.draft.params["norm"]["weight"], folder.draft.params["norm"]["weight"]
    np.testing.assert_array_equal(*leaves)


def test_a_whisper_is_no_gguf_file(file):
    folders.check_kind("--target", file, speech=False)
    with pytest.raises(ValueError, match=r"--target must be the folder of a Whisper, got the GGUF file .*model.gguf"):
        folders.check_kind("--target", file, speech=True)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4" + bytes(40))
    with pytest.raises(ValueError, match=r"model.gguf must be a GGUF file, but it begins with b'PK"):
        generation.load(tmp_path / "model.gguf", None, None)
