"""One line at the bottom of a terminal that changes in place; everything else is printed above it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from typing import TextIO

Render = Callable[[int], str]  # the line for a terminal with this many columns

ERASE = b"\r\x1b[K"  # back to the first column, and erase the row
INTERVAL_SECONDS = 0.1  # least time between two drawings of the line
# set by terminals that wrap again what is on the screen when their window gets narrower
REWRAPPING = (
    "TMUX",
    "VTE_VERSION",
    "KITTY_WINDOW_ID",
    "WT_SESSION",
    "ALACRITTY_WINDOW_ID",
    "WEZTERM_PANE",
    "ITERM_SESSION_ID",
)
DEFAULT_COLUMNS = 80  # of a terminal that does not say its size


class LiveLine:
    """Draws a line in the last row of a terminal, again and again.

    Streams of `streams` erase the line before they write, and draw it again below. Without `open`, or
    where it returned False, nothing is ever drawn. A fork draws nothing.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._descriptor: int | None = None
        self._encoding = "ascii"
        self._render: Render | None = None
        self._is_drawn = False
        self._width = 0  # columns of the line that is drawn
        self._is_row_empty = True  # nothing was printed since the last end of a line
        self._drawn_at = 0.0
        self.is_of_another = False  # another process may have drawn a line on this terminal

    @property
    def is_open(self) -> bool:
        """Whether there is a terminal to draw on."""
        return self._descriptor is not None

    @property
    def is_unicode(self) -> bool:
        """Whether the terminal can show the blocks of a bar."""
        return self._encoding.lower().replace("-", "").startswith("utf")

    def open(self, stream: TextIO) -> bool:
        """Draw on ``stream`` from now on, if it is a terminal that can erase a row; return whether it is."""
        if is_terminal(stream) and os.environ.get("TERM") != "dumb":
            self._descriptor, self._encoding = stream.fileno(), stream.encoding
        return self.is_open

    def close(self) -> None:
        """Erase the line and draw nothing any more."""
        self.show(None)
        self._descriptor = None

    def show(self, render: Render | None) -> None:
        """Draw the line that ``render`` returns for a number of columns; None: erase it.

        Calls that follow each other within ``INTERVAL_SECONDS`` are drawn once.
        """
        if self._descriptor is None:
            return
        with self._lock:
            is_new = render is None or self._render is None
            self._render = render
            if is_new or time.monotonic() - self._drawn_at >= INTERVAL_SECONDS:
                self._draw()

    @contextlib.contextmanager
    def showing(self, render: Render) -> Iterator[None]:
        """Show another line in the block, and the one of before after it."""
        before = self._render
        self.show(render)
        try:
            yield
        finally:
            self.show(before)

    @contextlib.contextmanager
    def making_room(self, content: bytes) -> Iterator[bytes]:
        """Erase the line while ``content`` is written to the terminal; yield what to write."""
        if self._descriptor is None:
            yield ERASE + content if self.is_of_another and self._is_row_empty else content
            self._is_row_empty = content.endswith(b"\n")
            return
        with self._lock:
            yield self._erase(columns_of(self._descriptor)) + content if self._is_drawn else content
            self._is_drawn = False
            self._is_row_empty = content.endswith(b"\n")
            if self._is_row_empty:
                self._draw()

    def _draw(self) -> None:
        if self._descriptor is None:
            return
        columns = columns_of(self._descriptor)
        content = self._erase(columns) if self._is_drawn or self._is_row_empty else b"\n"
        if self._render is not None:
            shown = self._render(columns).encode(self._encoding, "plain").decode(self._encoding)
            shown = clip(shown, columns - 1, end="…" if self.is_unicode else "...")
            content += shown.encode(self._encoding, "plain")
            self._width = sum(map(_width, shown))
        elif not self._is_drawn:
            return
        self._is_drawn, self._is_row_empty, self._drawn_at = self._render is not None, True, time.monotonic()
        with contextlib.suppress(OSError):
            os.write(self._descriptor, content)

    def _erase(self, columns: int) -> bytes:
        """Return what erases the line that is drawn; it takes several rows if the window got narrower."""
        rows_above = (self._width - 1) // columns if self._is_drawn and any(map(os.environ.get, REWRAPPING)) else 0
        return ERASE + b"\x1b[A\x1b[K" * rows_above

    def forget(self) -> None:
        """Draw nothing any more, in a fork: the terminal's last row belongs to the process that was forked."""
        is_of_another = self.is_open or self.is_of_another
        self.__init__()  # type: ignore[misc]  # the lock may be held by a thread that was not forked
        self.is_of_another = is_of_another


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether ``stream`` is a terminal; False for a closed one."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def columns_of(descriptor: int) -> int:
    """Return the width of the terminal; it changes when its window is resized."""
    try:
        return os.get_terminal_size(descriptor).columns or DEFAULT_COLUMNS
    except OSError:
        return DEFAULT_COLUMNS


def clip(text: str, columns: int, *, end: str = "…") -> str:
    """Return ``text`` without line breaks, cut to so many columns of a terminal; ``end`` shows that it was cut."""
    text = " ".join(text.split("\n"))
    widths = [_width(each) for each in text]
    if sum(widths) <= columns:
        return text
    kept, used = 0, len(end)
    while used + widths[kept] <= columns:
        used += widths[kept]
        kept += 1
    return text[:kept] + end[: max(0, columns)]


def _width(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "FW" else 1


line = LiveLine()  # a process has one
os.register_at_fork(after_in_child=line.forget)
