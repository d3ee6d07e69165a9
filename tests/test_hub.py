"""Ids of models of the Hugging Face hub: their folders in the cache, and what is said where they cannot be fetched."""

import json
import sys
import types
from pathlib import Path

import pytest

from specsamp_jax._hub import FILES, find_checkpoint, is_complete
from specsamp_jax.cli.folders import draft_folder
from specsamp_jax.cli.pair import ASSETS
from specsamp_jax.models import load_generation_config, load_module
from specsamp_jax.text import load_tokenizer

NAME = "someone/small-model"
COMMIT = "0123456789abcdef"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.chdir(tmp_path)
    # Nobody is asked unless a test says so.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    return tmp_path / "hub"


def snapshot(cache, files=("config.json", "tokenizer.json", "model.safetensors")):
    """A model in the cache: its files are links into a folder of blobs."""
    folder = cache / "models--someone--small-model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    files_folder = folder / "snapshots" / COMMIT
    files_folder.mkdir(parents=True)
    (folder / "blobs").mkdir()
    for name in files:
        (folder / "blobs" / name).write_bytes(source(name).read_bytes())
        (files_folder / name).symlink_to(Path("../../blobs") / name)
    return files_folder


def source(name):
    return ASSETS / name if name.startswith("tokenizer") else ASSETS / "drafter" / name


def fetching(monkeypatch, fetch, ask=lambda name: None):
    hub = types.SimpleNamespace(snapshot_download=fetch, model_info=ask)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)


def test_a_model_in_the_cache_is_loaded_by_its_id(cache):
    folder = snapshot(cache)
    assert find_checkpoint(NAME) == folder
    assert load_module(NAME).config == load_module(ASSETS / "drafter").config
    assert load_tokenizer(NAME).decode([843, 269]) == "Return the"
    assert load_generation_config(NAME).eos_token == load_generation_config(folder).eos_token


def test_a_folder_of_that_name_wins(cache, tmp_path):
    snapshot(cache)
    (tmp_path / NAME).mkdir(parents=True)
    assert find_checkpoint(NAME) == Path(NAME)


def test_what_the_cache_lacks_is_fetched(cache, monkeypatch, tmp_path):
    calls = []

    def fetch(name, **options):
        calls.append((name, options))
        return str(snapshot(cache))

    fetching(monkeypatch, fetch)
    assert is_complete(find_checkpoint(NAME))
    assert calls == [(NAME, {"allow_patterns": list(FILES), "cache_dir": str(cache)})]
    find_checkpoint(NAME)
    assert len(calls) == 1
    (cache / "models--someone--small-model" / "blobs" / "model.safetensors").unlink()  # as a download in part leaves it
    fetching(monkeypatch, lambda name, **options: str(tmp_path))
    with pytest.raises(ValueError, match="weights in safetensors"):
        find_checkpoint(NAME)


def test_all_shards_are_needed(cache):
    folder = snapshot(cache, ("config.json", "tokenizer.json"))
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert not is_complete(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert is_complete(folder)
    for broken in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        assert not is_complete(folder)


def test_without_the_package_the_extra_is_named(cache):
    with pytest.raises(ValueError, match=r"--target: there is no folder someone/small-model, .* specsamp\[hub\]\."):
        find_checkpoint(NAME, "--target")


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("SmolLM2-135M-Instruct", "; a model .* is named ORG/NAME, for instance HuggingFaceTB/SmolLM2-135M-Instruct."),
        ("gpt2", "; a model of the Hugging Face hub is named ORG/NAME, .*"),
        ("nowhere", r"\."),
        ("model-7b.gguf", r"\."),
        ("/models/gpt2", r"\."),
    ],
)
def test_a_name_without_its_organisation_gets_a_hint(cache, name, end):
    with pytest.raises(ValueError, match=f"^--target must be a folder, but there is no {name}{end}$"):
        find_checkpoint(name, "--target")
    with pytest.raises(ValueError, match=f"^--draft must be a folder or 'ngram', but there is no {name}{end}$"):
        draft_folder(name)


def error_of(*names):
    kind = Exception
    for name in names:
        kind = type(name, (kind,), {})
    return kind("a long story\nin several lines")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (error_of("LocalEntryNotFoundError"), "hub: the network does not reach it."),
        (error_of("ConnectError"), "hub: the network does not reach it."),
        (error_of("LocalEntryNotFoundError", "IncompleteSnapshotError"), "hub: the network does not reach it."),
        (error_of("RepositoryNotFoundError"), "hub: there is no such model, or it is private and HF_TOKEN is not set."),
        (error_of("RepositoryNotFoundError", "GatedRepoError"), "hub: its licence must be accepted on its page, and"),
        (error_of("OfflineModeIsEnabled"), "hub: HF_HUB_OFFLINE is set."),
        (error_of("Odd"), "hub: Odd: a long story."),
        (PermissionError(13, "Permission denied"), "hub: PermissionError: [Errno 13] Permission denied."),
    ],
)
def test_a_failure_is_one_sentence(error, sentence, cache, monkeypatch):
    def fetch(name, **options):
        raise error

    fetching(monkeypatch, fetch)
    with pytest.raises(ValueError, match=r"path: there is no folder someone/small-model, the cache") as failure:
        find_checkpoint(NAME)
    assert sentence in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_model_without_safetensors_is_refused(cache, monkeypatch):
    fetching(monkeypatch, lambda name, **options: str(snapshot(cache, ("config.json",))))
    with pytest.raises(ValueError, match=r"someone/small-model has no config.json, tokenizer.json and weights in safe"):
        find_checkpoint(NAME)


def test_a_part_in_the_cache_without_a_network_says_nothing_about_the_hub(cache, monkeypatch):
    def ask(name):
        raise error_of("ConnectError")

    # Without a network, huggingface_hub returns the part that it holds.
    fetching(monkeypatch, lambda name, **options: str(snapshot(cache, ("config.json",))), ask)
    with pytest.raises(ValueError, match=r"the cache .* does not hold this model whole, and .* network does not reach"):
        find_checkpoint(NAME)


@pytest.mark.parametrize(
    "path", ["nowhere", "a/b/c", "/a/b", "../a", "models/small", "a/b.gguf", "a/..", "a/-b", "~/a"]
)
def test_a_path_that_is_no_id_is_sent_to_nobody(path, tmp_path):
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match=f"path must be a folder, but there is no {path}"):
        find_checkpoint(path)
