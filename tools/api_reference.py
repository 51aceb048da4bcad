"""``python -m tools.api_reference``: write ``docs/api.md`` from the docstrings of all exported names."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "api.md"
PACKAGES = ("pipeline.sparse", "pipeline.tickets", "pipeline.inference", "pipeline.evaluation", "pipeline.models")
INTRODUCTION = """# Python API

Every name that these packages export, from its docstring. Names that are not here may change in any version; these
follow [SemVer](../CHANGELOG.md). `python -m tools.api_reference` writes this page.
"""
SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields")
WIDTH = 100


def markdown() -> str:
    """Return the page."""
    return "\n".join([INTRODUCTION, *(line for name in PACKAGES for line in package_lines(name))])


def package_lines(name: str) -> Iterator[str]:
    """Yield the lines of one package: what it is for, then its names in the order of the alphabet."""
    package = importlib.import_module(name)
    yield from (f"## {name}", "", documentation(package), "")
    for exported in sorted(package.__all__, key=str.lower):
        item = getattr(package, exported)
        yield from (f"### {exported}", "")
        if not callable(item):
            yield from (f"A table: {', '.join(f'`{row}`' for row in item)}.", "")
            continue
        yield from (code(f"{name}.{exported}", item), "", documentation(item), "")
        if inspect.isclass(item):
            yield from member_lines(exported, item)


def member_lines(name: str, item: type) -> Iterator[str]:
    """Yield the lines of the public methods and properties of a class that have a docstring of their own."""
    for member, value in vars(item).items():
        bare = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if member.startswith("_") or not inspect.getdoc(bare):
            continue
        if inspect.isfunction(bare):
            yield from (f"#### {name}.{member}", "", code(member, bare), "", documentation(bare), "")
        elif isinstance(bare, property):
            yield from (f"#### {name}.{member}", "", documentation(bare), "")


def code(name: str, item: Any) -> str:
    """Return a signature as a block of code; parameters that do not fit in one line get a line each."""
    if dataclasses.is_dataclass(item):
        return "\n".join(["```python", f"class {name}:", *field_lines(item), "```"])
    signature = inspect.signature(item)
    parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
    texts: list[str] = []
    for index, each in enumerate(parameters):
        if each.kind is each.KEYWORD_ONLY and (index == 0 or parameters[index - 1].kind is not each.KEYWORD_ONLY):
            texts.append("*")
        annotation = each.annotation
        if not isinstance(annotation, str) and hasattr(annotation, "__forward_arg__"):
            annotation = annotation.__forward_arg__  # of a NamedTuple
        text = str(each.replace(annotation=each.empty))
        if annotation is not each.empty:
            default = "" if each.default is each.empty else f" = {each.default!r}"
            prefix = "**" if each.kind is each.VAR_KEYWORD else ""
            text = f"{prefix}{each.name}: {annotation}{default}"
        texts.append(text)
    returned = signature.return_annotation
    end = f" -> {returned}" if isinstance(returned, str) and not inspect.isclass(item) else ""
    line = f"{name}({', '.join(texts)}){end}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {text},\n" for text in texts) + f"){end}"
    return f"```python\n{line}\n```"


def field_lines(item: Any) -> list[str]:
    """Return the fields of a dataclass as its source has them, with their comments."""
    docstring = inspect.getsource(item).partition('"""')[2].partition('"""')[2]
    lines = re.split(r"^    (?:@|def )", docstring, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    return [line for line in lines if line.strip()]


def documentation(item: Any) -> str:
    """Return a docstring as Markdown: its sections become lists, its blocks of code are fenced."""
    lines = (inspect.getdoc(item) or "").splitlines()
    text: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        title = line[:-1] if line.endswith(":") else ""
        if title not in SECTIONS and not line.endswith("::"):
            text.append(line)
            continue
        block = []
        while index < len(lines) and (not lines[index].strip() or lines[index].startswith("    ")):
            block.append(lines[index][4:])
            index += 1
        while block and not block[-1].strip():
            block.pop()
        if title in SECTIONS:
            text += [f"**{title}**", "", *entries(block, has_names=title not in ("Returns", "Yields")), ""]
        else:
            while block and not block[0].strip():
                block.pop(0)
            text += [f"{line[:-1]}", "", "```python", *block, "```", ""]
    return plain("\n".join(text)).strip()


def entries(block: list[str], *, has_names: bool) -> list[str]:
    """Return the entries of a section, ``name: text``, as a list; a text that is no list as it is."""
    if not has_names:
        return block
    return [
        re.sub(r"^(\*{0,2}\w[\w, ]*): ", r"* `\1`: ", line)
        if line and not line.startswith(" ")
        else f"  {line.strip()}"
        for line in block
    ]


def plain(text: str) -> str:
    """Return text of a docstring with Markdown's code marks in place of those of reStructuredText."""
    pieces = re.split(r"(^```.*?^```)", text, flags=re.MULTILINE | re.DOTALL)  # odd ones are code
    for index in range(0, len(pieces), 2):
        piece = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", pieces[index])
        pieces[index] = piece.replace("``", "`")
    return "".join(pieces)


if __name__ == "__main__":
    PAGE.write_text(markdown())
    print(f"wrote {PAGE}")
