"""Standard output and error that never end a command: closed, full, or unable to show a character."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from collections.abc import Callable
from typing import Any

from pipeline.terminal.live import line

WAIT_SECONDS = 10.0  # once, for a reader that takes nothing more for now
# What a stream in another encoding shows instead; any other character is shown as Python's escape.
PLAIN = str.maketrans(
    {
        "×": "x",
        "·": "*",
        **dict.fromkeys("–−—", "-"),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("‘’", "'"),
        "…": "...",
        "→": "->",
        "←": "<-",
        "≤": "<=",
        "≥": ">=",
        "±": "+-",
        "Δ": "d",
    }
)

_lost: dict[int, OSError] = {}  # file descriptor -> why it lost something first


def guard_output() -> None:
    """Let nothing that happens to stdout or stderr raise: the command goes on to its end.

    A closed pipe (``COMMAND | head``), a full disk, a terminal that has gone and a stream that was never
    open lose what is printed; `lost_output` says so. A character that the stream's encoding lacks is
    shown in another way. Streams that were replaced, for example by a test, are left alone.
    """
    for descriptor in range(3):
        _reserve(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed when Python started, so that a file may have its number now
            setattr(sys, name, open(os.devnull, "w", errors="plain"))  # noqa: SIM115, PTH123  # until the process ends
            continue
        if not isinstance(stream, io.TextIOWrapper) or stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError):
            stream.flush()
        replacement = io.TextIOWrapper(
            io.BufferedWriter(_Output(stream.fileno(), "wb", closefd=False)),
            encoding=stream.encoding,
            errors="plain",
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, replacement)


def lost_output() -> OSError | None:
    """Return why something printed to stdout was lost; None if nothing was, or if its reader closed the pipe."""
    return _lost.get(1)


class _Output(io.FileIO):
    """A file descriptor that discards what it cannot write, and makes room for the live line on a terminal."""

    def __init__(self, descriptor: int, *arguments: Any, **options: Any) -> None:
        super().__init__(descriptor, *arguments, **options)
        self._is_terminal = self.isatty()

    def write(self, content: Any, /) -> int:
        """Write ``content``, or discard it."""
        if not self._is_terminal:
            self._write_all(bytes(content))
        else:
            with line.making_room(bytes(content)) as with_room:
                self._write_all(with_room)
        return memoryview(content).nbytes

    def _write_all(self, content: bytes) -> None:
        while content:
            try:
                written = super().write(content)
            except BrokenPipeError:
                return
            except OSError as error:
                _lost.setdefault(self.fileno(), error)
                return
            if written is None and not self._has_room():
                _lost.setdefault(self.fileno(), TimeoutError(f"its reader took nothing for {WAIT_SECONDS:g} s"))
                return
            content = content[written or 0 :]

    def _has_room(self) -> bool:
        """Wait until a pipe that must not block takes more; only once for a reader that takes nothing."""
        seconds = 0.0 if self.fileno() in _lost else WAIT_SECONDS
        return bool(select.select([], [self.fileno()], [], seconds)[1])


def _reserve(descriptor: int) -> None:
    """Open the null device under the number of a standard stream that is closed, before a file gets that number."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _plain(error: UnicodeError) -> tuple[str, int]:
    """Return the ASCII characters for those that an encoding lacks, as an error handler of `codecs`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


_handler: Callable[[UnicodeError], tuple[str, int]] = _plain
codecs.register_error("plain", _handler)
