"""README.md and docs/: the code runs as it stands and prints what the page says, and links lead somewhere."""

import itertools
import re
from pathlib import Path

import pytest

from specsamp_jax.certificate import checks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FIRST_PAGES = ("README.md", "index.md")  # print what the trained pair writes
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE)
OUTPUT = re.compile(r"^````.*?^````$", re.DOTALL | re.MULTILINE)  # of a command, which may hold blocks
NOT_RUN = re.compile(r"<!-- not run: \S.*-->\n+$")


def name(page):
    return page.relative_to(ROOT).as_posix()


def code_blocks(page):
    """Each Python block of a page, with the output that the next block says it prints, or None.

    A block after `<!-- not run: REASON -->` is left out.
    """
    text = OUTPUT.sub("", page.read_text(encoding="utf-8"))
    blocks = list(BLOCK.finditer(text))
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        if block["language"] != "python" or NOT_RUN.search(text[: block.start()]):
            continue
        follows = after is not None and not text[block.end() : after.start()].strip()
        yield block["code"], after["code"] if follows and after["language"] == "text" else None


def with_marks(page):
    """The page; one that compiles for a GPU is run with the kernels, the first ones with programs without filters."""
    marks = [pytest.mark.kernels] if '"cuda"' in page.read_text(encoding="utf-8") else []
    marks += [pytest.mark.both_programs] if page.name in FIRST_PAGES else []
    return pytest.param(page, marks=marks)


@pytest.mark.optimised(False)
@pytest.mark.parametrize("page", [with_marks(page) for page in PAGES if list(code_blocks(page))], ids=name)
def test_the_code_of_a_page_runs_in_order_and_prints_what_the_page_says(page, capsys, monkeypatch, request):
    if page.name not in FIRST_PAGES:
        request.getfixturevalue("one_layer_pair")
    monkeypatch.setattr(checks, "NUM_BATCHES", 16)
    namespace = {"__name__": "page"}
    for code, output in code_blocks(page):
        exec(compile(code, name(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if output is not None:
            assert printed.split() == output.split()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_pictures_of_a_page_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_every_entry_of_the_navigation_is_a_page_and_every_page_but_guides_is_an_entry():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    entries = re.findall(r"([\w/-]+\.md)$", navigation, re.MULTILINE)
    pages = {page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.name != "README.md"}
    assert len(entries) == len(set(entries))
    assert set(entries) <= pages
    # docs/hooks.py appends the guides that are not listed.
    assert {page for page in pages - set(entries) if not page.startswith("guides/")} == set()
