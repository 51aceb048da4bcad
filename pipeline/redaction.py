"""Keeps passwords out of everything that a run writes or prints. Standard library only."""

from __future__ import annotations

import re

REDACTED = "[redacted]"
_URI_PASSWORD = re.compile(r"(://[^/:@\s]*):[^/@\s]+@")


def redact(text: str) -> str:
    """``text`` without the passwords of the URIs in it."""
    return _URI_PASSWORD.sub(rf"\1:{REDACTED}@", text)
