"""Whole numbers in text, of the command line, the environment and messages. Standard library only."""

from __future__ import annotations


def is_whole_number(text: str, minimum: int, maximum: int) -> bool:
    """Return whether ``text`` is an unsigned decimal number from ``minimum`` to ``maximum``."""
    return text.isascii() and text.isdecimal() and len(text) <= 20 and minimum <= int(text) <= maximum


def quantity(number: int, noun: str) -> str:
    """Return a number and what it counts, such as ``1 step`` or ``2,000 steps``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
