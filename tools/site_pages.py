"""What mkdocs calls while it builds the site: adds the pages that are outside docs/, and makes links work there.

A link of a page means the same file in the repository and on the site: another page, a picture, or a file
of the code, whose text the site carries under source/. Imports mkdocs and the standard library only.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {  # page of the site: its file in the repository, where that is not docs/<page>
    "index.md": "README.md",
    "recipes.md": "configs/README.md",
    "zoo.md": "zoo/README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "tests.md": "tests/README.md",
    "benchmarks.md": "benchmarks/README.md",
    "security.md": "SECURITY.md",
}
PAGES = {path: page for page, path in OUTSIDE.items()}
LINK = re.compile(r"(?<!\\)(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^( *```.*?^ *```)", re.MULTILINE | re.DOTALL)


def on_files(files: Any, *, config: Any) -> Any:
    """Add the pages that are outside docs/."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Point links at pages and files of the site, and write lists as Python-Markdown reads them."""
    name = page.file.src_uri
    path = OUTSIDE.get(name, f"docs/{name}")

    def linked(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        place, _, anchor = target.partition("#")
        wanted = posixpath.normpath(posixpath.join(posixpath.dirname(path), unquote(place)))
        address = page_or_file(wanted, config=config, files=files)
        if address is None:
            return match[0]  # mkdocs warns
        return f"{before}{address}{'#' * bool(anchor)}{anchor}{after}"

    pieces = FENCE.split(markdown)  # odd ones are code
    for index in range(0, len(pieces), 2):
        text = LINK.sub(linked, pieces[index])
        pieces[index] = re.sub(r"^ {2,3}(?=[*-] )", "    ", text, flags=re.MULTILINE)
    return "".join(pieces)


def page_or_file(wanted: str, *, config: Any, files: Any) -> str | None:
    """Return the address, from the root of the site, of a path of the repository; None if there is no such path."""
    full = ROOT / wanted
    if full.is_dir():
        if f"{wanted}/README.md" in PAGES:
            return PAGES[f"{wanted}/README.md"]
        content = "\n".join(
            sorted(each.name + "/" * each.is_dir() for each in full.iterdir() if each.name[0] not in "._")
        )
        wanted += "/index"
    elif wanted in PAGES:
        return PAGES[wanted]
    elif wanted.startswith("docs/"):
        return wanted.removeprefix("docs/") if full.is_file() else None
    elif full.is_file():
        content = full.read_text()
    else:
        return None
    address = f"source/{wanted}.txt"
    if files.get_file_from_path(address) is None:
        files.append(File.generated(config, address, content=content))
    return address
