"""Seeded damage: to bytes, to text, to JSON. The same ``draw`` gives the same damage."""

from __future__ import annotations

import copy
import random
from typing import Any

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    8,
    255,
    256,
    65535,
    2**31 - 1,
    2**31,
    2**32,
    2**48,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**30,
)
FLOATS = (0.0, -0.0, 0.5, 1.0, 1.0000001, 1e-45, 1e308, -1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    "",
    " ",
    "x",
    "../../etc/passwd",
    "/dev/zero",
    "a" * 300,
    "\x00",
    "\n",
    "\x1b[2J",
    "é",
    "\ud800",
    "null",
    "true",
    "1",
    "${seed}",
    "???",
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    *FLOATS,
    *TEXTS,
    None,
    True,
    False,
    [],
    {},
    [[]],
    [0],
    {"": 0},
    [1, 2, 3],
    {"a": {"b": []}},
)
TOKENS = (
    b"0",
    b"-1",
    b"NaN",
    b"1e999",
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b":",
    b",",
    b"null",
    b"true",
    b"\\ud800",
    b"\x00",
    b"\xff\xfe",
    b"9" * 40,
)


def damaged_bytes(content: bytes, draw: random.Random, *, head: int = 0) -> bytes:
    """Make one to eight changes, half of them in the first ``head`` bytes.

    Bits, bytes and numbers are changed; pieces are moved, removed, doubled or inserted.
    """
    damaged = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3, 8))):
        size = len(damaged)
        if not size:
            return bytes(damaged)
        at = draw.randrange(min(size, head) if head and draw.random() < 0.5 else size)
        kind = draw.randrange(10)
        if kind < 3:
            damaged[at] ^= 1 << draw.randrange(8)
        elif kind < 5:
            damaged[at] = draw.choice((0, 1, 0x20, 0x2D, 0x30, 0x39, 0x5B, 0x7B, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 5:
            width = draw.choice((1, 2, 4, 8))
            damaged[at : at + width] = (draw.choice(NUMBERS) % (1 << 8 * width)).to_bytes(width, "little")
        elif kind == 6:
            del damaged[at : at + draw.choice((1, 1, 2, 8, 64, size))]
        elif kind == 7:
            damaged[at:at] = draw.choice(TOKENS)
        elif kind == 8:
            damaged[at:at] = damaged[at : at + draw.choice((1, 8, 64))]
        else:
            end = min(size, at + draw.choice((1, 4, 16)))
            other = draw.randrange(size)
            damaged[at:end] = damaged[other : other + end - at]
    return bytes(damaged)


def damaged_tree(tree: Any, draw: random.Random) -> Any:
    """Copy nested dictionaries and lists with one to three changes.

    Entries are replaced, removed, renamed, added or exchanged.
    """
    root = [copy.deepcopy(tree)]
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holder, key = _somewhere(root, draw)
        value, kind = holder[key], draw.randrange(8)
        if kind < 3 or holder is root:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        elif kind == 3:
            del holder[key]
        elif kind == 4 and isinstance(value, int | float):
            holder[key] = draw.choice((value + 1, value - 1, -value, value * 2, str(value), float(value)))
        elif kind == 5 and isinstance(holder, dict):
            holder[draw.choice((f"{key}x", f"../{key}", key[:-1], str(draw.choice(TEXTS))))] = holder.pop(key)
        elif kind == 6 and isinstance(holder, dict):
            other = draw.choice(list(holder))
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(value, dict):
            value[draw.choice(("x", "format", "", "0"))] = copy.deepcopy(draw.choice(VALUES))
        elif isinstance(value, list):
            value.insert(draw.randint(0, len(value)), copy.deepcopy(draw.choice(VALUES)))
        else:
            holder[key] = draw.choice(([value], {"x": value}, [value, value]))
    return root[0]


def _somewhere(root: list[Any], draw: random.Random) -> tuple[Any, Any]:
    """Draw an entry as (container, key); all entries of a level are equally likely."""
    holder: Any = root
    key: Any = 0
    while isinstance(holder[key], dict | list) and holder[key] and draw.random() < 0.85:
        holder = holder[key]
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
    return holder, key


def damaged_text(text: str, draw: random.Random, *, words: tuple[str, ...]) -> str:
    """Damage text.

    Lines are moved, doubled, removed or indented, values replaced by one of ``words``, and single
    characters changed.
    """
    lines = text.split("\n")
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, kind = draw.randrange(len(lines)), draw.randrange(9)
        if kind < 4 and ":" in lines[at]:
            key, _, rest = lines[at].partition(":")
            lines[at] = f"{key}: {draw.choice(words)}" if draw.random() < 0.7 else f"{key[:-1]}:{rest}"
        elif kind == 4:
            lines[at:at] = [lines[draw.randrange(len(lines))]]
        elif kind == 5 and len(lines) > 1:
            del lines[at]
        elif kind == 6:
            lines[at] = (
                draw.choice((" ", "  ", "\t", "- ", "? ", "!!python/name:os.system ", "&a ", "<<: ")) + lines[at]
            )
        elif lines[at]:
            where = draw.randrange(len(lines[at]))
            lines[at] = (
                lines[at][:where]
                + draw.choice("'\"{}[]:,#&*!|>%@`\x00\x07é𝟙\ufeff0- ")
                + lines[at][where + draw.randint(0, 1) :]
            )
    return "\n".join(lines)
