"""Whole numbers in text, as the command line and the environment have them. Standard library only."""

from __future__ import annotations


def is_whole_number(text: str, minimum: int, maximum: int) -> bool:
    """Return whether ``text`` is an unsigned decimal number from ``minimum`` to ``maximum``."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and minimum <= int(text) <= maximum
