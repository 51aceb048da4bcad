"""Keep passwords out of everything that a run writes or prints. Standard library only."""

from __future__ import annotations

import os
import re
from typing import Any

REDACTED = "[redacted]"
MAX_CHARACTERS = 4000  # of a message, which may quote untrusted text of any length
_NAMES = r"passw|passphrase|pwd|secret|token|jwt|cookie|credential|authorization|(?:api|private|access)[_-]?key"
SECRET_KEY = re.compile(_NAMES, re.IGNORECASE)

# From the colon to the last @ before a space or quote, because a password may hold any other
# character. host:5000/a@b has a port and a path, not a password; PASSWORD@HOST is the form that a
# message recommends.
_URI_PASSWORD = re.compile(r"""(://[^/?#:@\s"']*):(?!PASSWORD@HOST:PORT|\d{1,5}(?:[/?#"'\s]|$))[^\s"']+@""")
_URI_USER = re.compile(r"""://[^/?#:@\s\["']+@""")  # without a password, it may be a token as well as a name
_ASSIGNED = re.compile(  # password=…, "api_key": "…", Authorization: Bearer …
    rf"""((?:{_NAMES})[\w.-]*["']?\s*[=:]\s*)(?:(basic|bearer)\s+)?("[^"\n]*"|'[^'\n]*'|[^\s"'\\&;,{{}}()\[\]]+)""",
    re.IGNORECASE,
)
_HARMLESS = re.compile(r"true|false|null|none|[\d.]{0,3}|<.*>", re.IGNORECASE)  # class_token: false
_DIRECTORIES = ("PWD", "OLDPWD")  # set by the shell, not secrets
_SHORTEST = 6  # characters: a shorter value of the environment, such as "1", would be found everywhere


def redact(text: str) -> str:
    """Redact passwords in URIs, values assigned to names of secrets, and the secrets of the environment."""
    for secret in _in_environment():
        text = text.replace(secret, REDACTED)
    if "://" in text:
        text = _URI_USER.sub(f"://{REDACTED}@", _URI_PASSWORD.sub(rf"\1:{REDACTED}@", text))
    return _ASSIGNED.sub(_without_value, text)


def printable(text: str, *, max_characters: int = MAX_CHARACTERS) -> str:
    """Return ``text`` as one line without secrets and control characters.

    Messages quote file names, keys and answers of servers, which may hold anything.
    """
    text = redact(" ".join(text.split()))
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text[:max_characters]
    )
    return shown + "…" * (len(text) > max_characters)


def redact_all(tree: Any) -> Any:
    """Redact every text in nested dictionaries and lists, and every text whose key names a secret; JSON stays JSON."""
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
    is_number = not quote and '"' in match[1]  # in JSON, text is quoted
    is_harmless = is_number or (not match[2] and _HARMLESS.fullmatch(match[3].strip("\"'")))
    return match[0] if is_harmless else f"{match[1]}{quote}{REDACTED}{quote}"


def _in_environment() -> list[str]:
    """List the secrets of the environment, longest first, because one may be part of another."""
    found = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and SECRET_KEY.search(name) and name not in _DIRECTORIES
    }
    return sorted(found, key=len, reverse=True)
