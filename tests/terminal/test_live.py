"""The live line, drawn on a real pseudo-terminal by a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from pipeline.terminal.live import REWRAPPING, clip
from tests.support.launch import ROOT
from tests.support.terminal import Terminal, screen

START = """
import logging, os, sys, time
from pipeline.terminal import live, progress, streams
live.INTERVAL_SECONDS = 0
streams.guard_output()
live.line.open(sys.stdout)
show = lambda text: live.line.show(lambda columns: text)
"""


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    with Terminal.opened(columns=40) as opened:
        yield opened


def run_on(terminal: Terminal, script: str, **environ: str) -> list[str]:
    """Run the script with its output on the terminal; return what a person sees at its end."""
    write_to(terminal, script, **environ)
    return screen(terminal.content, terminal.columns)


def write_to(terminal: Terminal, script: str, **environ: str) -> None:
    with terminal.path.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", START + script],
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8", **environ},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    terminal.read_until(lambda: process.poll() is not None)
    assert process.returncode == 0, terminal.content


def test_lines_are_printed_above_it(terminal: Terminal) -> None:
    script = "show('step 1'); print('one'); show('step 2'); print('two', file=sys.stderr); show('step 3')"
    assert run_on(terminal, script) == ["one", "two", "step 3"]
    assert run_on(terminal, "show('step 4'); live.line.close(); print('end')")[-3:] == ["two", "end", ""]


def test_a_part_of_a_line_is_not_erased(terminal: Terminal) -> None:
    assert run_on(terminal, "print('asks: ', end='', flush=True); show('step 1')") == ["asks: ", "step 1"]


@pytest.mark.parametrize(("tmux", "rows_above"), [("/tmp/tmux-0/default,1,0", 3), ("", 0)])
def test_where_a_narrower_window_wraps_it_all_its_rows_are_erased(
    terminal: Terminal, tmux: str, rows_above: int
) -> None:
    """39 columns of text are 4 rows of 12 columns; other terminals cut the line, and have a row of the log above it."""
    others = dict.fromkeys(REWRAPPING, "")
    write_to(terminal, "show('x' * 39); live.columns_of = lambda _: 12; print('one')", **others | {"TMUX": tmux})
    assert terminal.content.count(b"\r\x1b[K" + rows_above * b"\x1b[A\x1b[K" + b"one") == 1


def test_it_is_cut_to_the_width_and_follows_a_resize(terminal: Terminal) -> None:
    assert run_on(terminal, "show('step ' + '1234567890' * 9)") == [
        "step 1234567890123456789012345678901234"[:38] + "…"
    ]
    terminal.content = b""
    terminal.resize(12)
    assert run_on(terminal, "show('step 1234567890')") == ["step 12345…"]


@pytest.mark.parametrize(
    ("text", "columns", "expected"), [("ab", 2, "ab"), ("abc", 2, "a…"), ("", 0, ""), ("a", 0, "")]
)
def test_clip(text: str, columns: int, expected: str) -> None:
    assert clip(text, columns) == expected


def test_clip_counts_wide_characters_twice() -> None:
    assert clip("中文字", 6) == "中文字"
    assert clip("中文字", 5) == "中文…"
    assert clip("中文字", 4) == "中…"
    assert clip("two\nlines", 20) == "two lines"


@pytest.mark.parametrize(("environ", "redirect"), [({"TERM": "dumb"}, ""), ({}, "sys.stdout = open('/dev/null', 'w')")])
def test_nothing_is_drawn_where_a_row_cannot_be_erased(
    terminal: Terminal, environ: dict[str, str], redirect: str
) -> None:
    script = f"{redirect}\nlive.line.close(); live.line.open(sys.stdout); show('step'); print('x', file=sys.stderr)"
    assert run_on(terminal, script, **environ) == ["x", ""]
    assert b"\x1b" not in terminal.content


def test_a_fork_does_not_draw(terminal: Terminal) -> None:
    script = (
        "show('step 1')\nif not os.fork(): show('wrong'); print('of a fork'); os._exit(0)\nos.wait(); show('step 2')"
    )
    assert run_on(terminal, script) == ["of a fork", "step 2"]


def test_progress_is_a_bar_and_leaves_nothing(terminal: Terminal) -> None:
    script = """
show('training')
with progress.show_progress('checking', 'pages') as report:
    report(1, 4); report(2, 4)
"""
    terminal.resize(80)
    assert run_on(terminal, script) == ["training"]
    assert b"checking:  50%|" in terminal.content and "█".encode() in terminal.content
    assert run_on(terminal, script, PYTHONIOENCODING="ascii")[-1] == "training"
    assert b"checking:  50%|#" in terminal.content
