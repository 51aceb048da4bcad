"""A pseudo-terminal, and what a person would see on it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import termios
import time
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path


class Terminal:
    """A pseudo-terminal: ``path`` is opened by the process under test; ``read`` returns what it has written."""

    def __init__(self, *, columns: int, rows: int = 40) -> None:
        self.master, self.slave = os.openpty()
        self.path = Path(os.ttyname(self.slave))
        self.content = b""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int = 40) -> None:
        self.columns = columns
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read(self, seconds: float = 0.0) -> bytes:
        """Read until nothing has come for ``seconds``; return all that has come so far."""
        while select.select([self.master], [], [], seconds)[0]:
            try:
                self.content += os.read(self.master, 1 << 16)
            except OSError:  # everybody else has closed it
                break
        return self.content

    def read_until(self, is_enough: Callable[[], bool], seconds: float = 60.0) -> bytes:
        """Read until ``is_enough()``, so that the process is never blocked."""
        deadline = time.monotonic() + seconds
        while not is_enough():
            assert time.monotonic() < deadline, screen(self.content, self.columns)
            self.read(0.01)
        return self.read(0.05)

    def close(self) -> None:
        for descriptor in (self.master, self.slave):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, *, columns: int = 80) -> Iterator[Terminal]:
        terminal = cls(columns=columns)
        try:
            yield terminal
        finally:
            terminal.close()


def screen(content: bytes, columns: int) -> list[str]:
    """Return the rows that a terminal of so many columns shows, without those that have scrolled away.

    Knows what is used: line ends, the return to the first column, and erasing to the end of the row.
    """
    rows, column = [""], 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", content.decode(errors="replace"), re.DOTALL):
        if part == "\n":
            rows.append("")
        elif part == "\r":
            column = 0
        elif part.startswith("\x1b["):
            assert part == "\x1b[K", f"unknown control sequence {part!r}"
            rows[-1] = rows[-1][:column]
        else:
            if column + width(part) > columns:  # wraps
                rows.append("")
                column = 0
            rows[-1] = rows[-1][:column].ljust(column) + part + rows[-1][column + 1 :]
            column += width(part)
    return rows


def width(character: str) -> int:
    return 2 if unicodedata.east_asian_width(character) in "FW" else 1
