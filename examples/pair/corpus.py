"""The corpus of the trained pair: docstrings without duplicates, and without overlap with the held-out ones."""

from collections.abc import Iterable, Iterator

from specsamp_jax.cli.docstrings import Docstring


def without_duplicates(documents: Iterable[Docstring]) -> Iterator[Docstring]:
    """The documents in order, less each whose text came before."""
    seen = set()
    for document in documents:
        if document.text not in seen:
            seen.add(document.text)
            yield document


def without_overlap(documents: Iterable[Docstring], held_out: Iterable[Docstring]) -> Iterator[Docstring]:
    """The documents in order, less each that shares a passage of 20 words with a held-out one.

    Packages quote one another, and a loss on text that was trained on says nothing. A document of fewer than 20 words
    is one passage. White space does not count.

    Args:
        documents: What would be trained on.
        held_out: What must not have been seen.
    """
    passages = {passage for document in held_out for passage in _passages(document.text)}
    for document in documents:
        if passages.isdisjoint(_passages(document.text)):
            yield document


def _passages(text: str) -> Iterator[str]:
    """Every run of 20 words of a text, or all of it."""
    # 20 words are longer than the stock phrases of a parameter list and shorter than a quoted paragraph.
    words = text.split()
    for start in range(max(1, len(words) - 19)):
        yield " ".join(words[start : start + 20])
