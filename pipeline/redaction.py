"""Keeps passwords out of everything that a run writes or prints. Standard library only."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "[redacted]"
MAX_CHARACTERS = 4000  # of a message: what it is about may be as long as somebody wanted
_NAMES = r"passw|passphrase|pwd|secret|token|jwt|cookie|credential|authorization|(?:api|private|access)[_-]?key"
SECRET_KEY = re.compile(_NAMES, re.IGNORECASE)

# From the colon to the last @ before a space or quote: a password may hold anything else.
# host:5000/a@b is a port and a path.
_URI_PASSWORD = re.compile(r"""(://[^/?#:@\s"']*):(?!\d{1,5}(?:[/?#"'\s]|$))[^\s"']+@""")
_URI_USER = re.compile(r"""://[^/?#:@\s\["']+@""")  # alone in front of a host it is as often a token as a name
_ASSIGNED = re.compile(  # password=…, "api_key": "…", Authorization: Bearer …
    rf"""((?:{_NAMES})[\w.-]*["']?\s*[=:]\s*)(?:(basic|bearer)\s+)?("[^"\n]*"|'[^'\n]*'|[^\s"'\\&;,{{}}()\[\]]+)""",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"true|false|null|none|[\d.]{0,3}|<.*>", re.IGNORECASE)  # class_token: false
_DIRECTORIES = ("PWD", "OLDPWD")  # of the shell
_SHORTEST = 6  # characters of a secret in the environment that is looked for: "1" would be found everywhere


def redact(text: str) -> str:
    """``text`` without passwords of URIs, without what is assigned to names of secrets, and without the secrets of the environment."""
    for secret in _in_environment():
        text = text.replace(secret, REDACTED)
    if "://" in text:
        text = _URI_USER.sub(f"://{REDACTED}@", _URI_PASSWORD.sub(rf"\1:{REDACTED}@", text))
    return _ASSIGNED.sub(_without_value, text)


def printable(text: str, *, max_characters: int = MAX_CHARACTERS) -> str:
    """One line, without secrets and what a terminal would obey: names of files and keys, and what a server says, may hold anything."""
    text = redact(" ".join(text.split()))
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:max_characters]
    )
    return shown + "…" * (len(text) > max_characters)


def redact_all(tree: Any) -> Any:
    """The same for every text in nested dictionaries and lists, also what lies under the name of a secret; JSON stays JSON."""
    if isinstance(tree, dict):
        return {
            key: REDACTED if isinstance(value, str) and SECRET_KEY.search(str(key)) else redact_all(value)
            for key, value in tree.items()
        }
    if isinstance(tree, list | tuple):
        return [redact_all(item) for item in tree]
    return redact(tree) if isinstance(tree, str) else tree


def _without_value(match: re.Match[str]) -> str:
    quote = match[3][0] if match[3][0] in "\"'" else ""
    is_number = not quote and '"' in match[1]  # JSON: text is in quotes there
    is_harmless = is_number or (not match[2] and _HARMLESS.fullmatch(match[3].strip("\"'")))
    return match[0] if is_harmless else f"{match[1]}{quote}{REDACTED}{quote}"


def _in_environment() -> list[str]:
    """The longest first: one may be a part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and SECRET_KEY.search(name) and name not in _DIRECTORIES
    }
    return sorted(found, key=len, reverse=True)
