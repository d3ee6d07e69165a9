"""MkDocs hooks: complete the API pages with every public name, and the navigation with every guide."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- the other names of ([\w.]+) -->")


def public_names(package: str) -> list[str]:
    """Returns the names that a package's `__init__.py` exports: those imported as themselves."""
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    return re.findall(r"^from [\w.]+ import (\w+) as \1$", source, re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the names that no API page lists where a page asks for them."""

    def rest(match):
        listed = {
            name
            for page in (ROOT / "docs" / "api").glob("*.md")
            for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        }
        names = [f"{match[1]}.{name}" for name in public_names(match[1])]
        return "\n".join(f"::: {name}" for name in names if name not in listed)

    return MARK.sub(rest, markdown)


def on_config(config: Any) -> Any:
    """Appends guides that the navigation does not list to its section of guides."""
    guides = next(section["Guides"] for section in config.nav if "Guides" in section)
    listed = {entry if isinstance(entry, str) else next(iter(entry.values())) for entry in guides}
    pages = sorted(f"guides/{page.name}" for page in (ROOT / "docs" / "guides").glob("*.md"))
    guides += [page for page in pages if page not in listed]
    return config
