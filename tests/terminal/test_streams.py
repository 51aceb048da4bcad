"""Whatever happens to stdout and stderr, a command goes on to its end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT
from tests.support.terminal import Terminal

# prints before and after, and shows by a file that it came to its end
PRINTS = """
import sys, pathlib
from pipeline.terminal.streams import guard_output, lost_output
guard_output()
print("width × height → 3 Δ …", "\\udcff 中")
print("warning ×", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    print("end", file=sys.stdout, flush=True)
    file.write(f"{file.fileno()} {lost_output()}")
"""
EXPECTED = "width x height -> 3 d ... \\udcff \\u4e2d\nend\n"


def run_script(folder: Path, *, shell: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run PRINTS; ``shell`` redirects its output."""
    (folder / "prints.py").write_text(PRINTS, encoding="utf-8")
    return subprocess.run(
        ["bash", "-c", f"exec {sys.executable} {folder}/prints.py {folder}/file {shell}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "environ",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_characters_that_an_encoding_lacks_are_shown_in_another_way(environ: dict[str, str], tmp_path: Path) -> None:
    done = run_script(tmp_path, **environ)
    assert (done.returncode, done.stdout, done.stderr) == (0, EXPECTED, "warning x\n")
    assert (tmp_path / "file").read_text().endswith(" None")


def test_an_encoding_shows_what_it_has(tmp_path: Path) -> None:
    done = run_script(tmp_path, PYTHONIOENCODING="utf-8")
    assert done.stdout == "width × height → 3 Δ … \\udcff 中\nend\n"


@pytest.mark.parametrize(
    ("shell", "reason"),
    [
        (">/dev/full", "[Errno 28] No space left on device"),
        (">/dev/full 2>&1", "[Errno 28] No space left on device"),
        ("2>/dev/full", "None"),  # what is lost on stderr was no output
        (">&-", "None"),
        (">&- 2>&- <&-", "None"),
        ("> >(exec true)", "None"),  # a reader that has gone
    ],
)
def test_output_that_cannot_be_written_is_lost(shell: str, reason: str, tmp_path: Path) -> None:
    done = run_script(tmp_path, shell=shell)
    assert done.returncode == 0, done.stderr
    number, _, told = (tmp_path / "file").read_text().partition(" ")
    assert told == reason
    assert int(number) > 2, "a file must never have the number of a standard stream"


def test_a_terminal_that_has_gone_ends_nothing(tmp_path: Path) -> None:
    waits = PRINTS.replace("guard_output()\n", "guard_output()\nsys.stdin.read()\n", 1)
    with Terminal.opened() as terminal, terminal.path.open("wb") as output:
        command = [sys.executable, "-c", waits, str(tmp_path / "file")]
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output)
    process.communicate(b"", timeout=60)  # now that the terminal is closed
    assert process.returncode == 0
    assert (tmp_path / "file").read_text().endswith("[Errno 5] Input/output error")


def test_a_command_whose_output_is_lost_fails(tmp_path: Path) -> None:
    """With 73, where the output is all there is; a pipe without a reader is no error."""
    lost = ["launchers/train.py", "--config", "fashion_mnist_s90", "--print-config"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run([sys.executable, *lost], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 73
    assert done.stderr.startswith("ERROR[73] rank=0 the output could not be written: No space left on device; ")
