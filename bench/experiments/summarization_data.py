"""Pairs for summarisation: the long description of each Debian package, and its one-line synopsis.

    apt-get update -o Acquire::Languages=en
    python bench/experiments/summarization_data.py [Translation-en]

Writes `pairs.jsonl.gz` into the cache. 400 packages are held out: those whose names have the smallest SHA-256. Their
names are in `summarization_heldout.txt`. A training pair that shares its description with a pair that is held out is
left out; one that shares a part of it, as packages of one source do, is not.
"""

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from caches import CACHE

FOLDER = CACHE / "summarization"
PAIRS = FOLDER / "pairs.jsonl.gz"
NAMES = Path(__file__).parent / "summarization_heldout.txt"
LISTS = Path("/var/lib/apt/lists")
CHECKSUM = "62f59c3cdca9786e4f7adf9002f9f5729a684adcb4667e58e448dec9b5a46c7f"
"""SHA-256 of the text that was used: main of Debian 12.12 or later, in English, uncompressed."""

NUM_HELD_OUT = 400
FEWEST_WORDS = 30


class Pair(NamedTuple):
    """A package's texts.

    Attributes:
      name: The package.
      description: The long description, without line breaks.
      synopsis: The line that summarises it.
    """

    name: str
    description: str
    synopsis: str


def parse(text: str) -> Iterator[Pair]:
    """Yields the package of each paragraph of a Translation-en file."""
    for paragraph in text.split("\n\n"):
        lines = paragraph.strip("\n").split("\n")
        fields = dict(line.split(": ", 1) for line in lines if not line.startswith(" ") and ": " in line)
        if "Package" in fields and "Description-en" in fields:
            # A line with a full stop alone separates paragraphs.
            body = [line.strip() for line in lines if line.startswith(" ") and line.strip() != "."]
            yield Pair(fields["Package"], " ".join(body), fields["Description-en"].strip())


def usable(pairs: Iterator[Pair]) -> list[Pair]:
    """Returns the pairs with a long description, and a synopsis that no pair before them has."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        if len(pair.description.split()) >= FEWEST_WORDS and pair.synopsis:
            found.setdefault(pair.synopsis, pair)
    return list(found.values())


def digest(name: str) -> str:
    """SHA-256 of a package's name."""
    return hashlib.sha256(name.encode()).hexdigest()


def split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs to train on and those held out, the latter by hash."""
    ordered = sorted(pairs, key=lambda pair: digest(pair.name))
    held_out, rest = ordered[:NUM_HELD_OUT], ordered[NUM_HELD_OUT:]
    descriptions = {pair.description for pair in held_out}
    return [pair for pair in rest if pair.description not in descriptions], held_out


def read() -> dict[str, list[Pair]]:
    """Returns the pairs in the cache, by "train" and "test".

    Raises:
      ValueError: They have not been fetched.
    """
    if not PAIRS.exists():
        raise ValueError(f"{PAIRS} must hold the pairs, and is missing: run {Path(__file__).name} first.")
    found: dict[str, list[Pair]] = {"train": [], "test": []}
    with gzip.open(PAIRS, "rt", encoding="utf-8") as file:
        for line in file:
            part, *pair = json.loads(line)
            found[part].append(Pair(*pair))
    return found


def _text(path: Path) -> str:
    """The text of a Translation-en file, as apt keeps it: plain, or compressed."""
    helper = "/usr/lib/apt/apt-helper"
    command = ["cat", str(path)] if path.suffix in ("", ".txt") else [helper, "cat-file", str(path)]
    return subprocess.run(command, check=True, capture_output=True).stdout.decode()


def main() -> None:
    paths = [Path(arg) for arg in sys.argv[1:]] or sorted(LISTS.glob("*_main_i18n_Translation-en*"))
    if not paths:
        raise ValueError(f"{LISTS} must hold Translation-en: run apt-get update -o Acquire::Languages=en.")
    text = _text(max(paths, key=lambda path: path.stat().st_size))
    checksum = hashlib.sha256(text.encode()).hexdigest()
    if checksum != CHECKSUM:
        print(f"Another release of Debian's texts: SHA-256 {checksum}, where {CHECKSUM} was used.", file=sys.stderr)
    pairs = usable(parse(text))
    train, held_out = split(pairs)
    names = [pair.name for pair in held_out]
    if NAMES.exists() and NAMES.read_text().split() != names:
        print(f"The names held out differ from those in {NAMES.name}, which is not rewritten.", file=sys.stderr)
    elif not NAMES.exists():
        NAMES.write_text("\n".join(names) + "\n")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with gzip.GzipFile(PAIRS, "wb", mtime=0) as file:
        for part, rows in (("train", train), ("test", held_out)):
            for pair in rows:
                file.write((json.dumps([part, *pair], ensure_ascii=False) + "\n").encode())
    print(f"{len(pairs):,} pairs: {len(train):,} to train on, {len(held_out)} held out; SHA-256 {checksum}")


if __name__ == "__main__":
    main()
