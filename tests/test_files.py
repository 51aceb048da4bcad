"""Files are whole or absent, however their writer ends."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launchers import train_cli
from pipeline.errors import WriteError
from pipeline.files import LOCK_NAME, at_work_in, only_process_in, parse_json, why_malformed, write_atomically
from pipeline.tickets import claim
from pipeline.tracking.journal import Journal
from pipeline.training import run_record

REWRITE = """
import sys
from pathlib import Path
from pipeline.files import write_atomically
while True:
    for letter in "abcdefghijklmnopqrstuvwxyz":
        write_atomically(Path(sys.argv[1]), sys.argv[2].encode() + letter.encode() * 300_000)
"""


def test_a_reader_sees_the_old_file_or_the_new_one_whenever_the_writer_dies(tmp_path: Path) -> None:
    path, seen, torn, is_over = tmp_path / "file", set(), [], threading.Event()
    path.write_bytes(b"-" + b"0" * 300_000)

    def read() -> None:
        while not is_over.is_set():
            content = path.read_bytes()
            seen.add(content[:2])
            if len(content) != 300_001 or content.count(content[1:2]) != 300_000:
                torn.append(content[:2])

    def has_written(attempt: int) -> bool:
        return any(start[:1] == str(attempt).encode() for start in set(seen))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for attempt in range(8):
            writer = subprocess.Popen([sys.executable, "-c", REWRITE, str(path), str(attempt)])
            try:
                deadline = time.monotonic() + 30
                while not has_written(attempt):
                    assert time.monotonic() < deadline and writer.poll() is None
                    time.sleep(0.001)
                time.sleep(0.003 * attempt)
            finally:
                writer.send_signal(signal.SIGKILL)
                writer.wait()
    finally:
        is_over.set()
    reader.join()
    assert not torn
    assert {name.name for name in tmp_path.iterdir()} <= {"file", ".file.tmp"}
    write_atomically(path, b"new")  # over the left-over
    assert [name.name for name in tmp_path.iterdir()] == ["file"]


def test_the_order_is_file_then_name_then_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        happened.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().name}")
        fsync(descriptor)

    def replaced(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        happened.append(f"rename {Path(source).name} {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "a", b"content")
    assert happened == ["fsync .a.tmp", "rename .a.tmp a", f"fsync {tmp_path.name}"]


def test_a_folder_has_one_process_at_work_until_it_ends(tmp_path: Path) -> None:
    code = "import sys, time; from pathlib import Path; from pipeline.files import only_process_in\n"
    code += "with only_process_in(Path(sys.argv[1])): "
    other = subprocess.Popen(
        [sys.executable, "-c", code + "print('mine', flush=True); time.sleep(60)", tmp_path], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"mine\n"
        with (
            pytest.raises(WriteError, match=rf"is in use by process {other.pid} on \S+ since 20\S+"),
            only_process_in(tmp_path),
        ):
            raise AssertionError
        run_record.write_run_id(tmp_path, "demo")
        told = rf"already holds run demo-[0-9a-f]{{12}}, in use by process {other.pid} on \S+ since 20\S+; "
        with pytest.raises(WriteError, match=told + "do: continue it with"):
            train_cli.check_output(tmp_path, resume="none")
        train_cli.check_output(tmp_path, resume="auto")
    finally:
        other.kill()
        other.communicate()
    assert at_work_in(tmp_path) == "" == at_work_in(tmp_path / "nowhere")
    train_cli.check_output(tmp_path, resume="none")  # its run has not got anywhere
    (tmp_path / "checkpoints/step-00000001").mkdir(parents=True)
    with pytest.raises(WriteError, match=r"already holds run demo-[0-9a-f]{12}; do: continue it with --resume auto"):
        train_cli.check_output(tmp_path, resume="none")
    with only_process_in(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")
    with only_process_in(tmp_path):
        pass


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_the_umask_decides_who_may_write_what_a_run_leaves(
    tmp_path: Path, umask: int, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no links here")

    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "ticket", b"content")
        claim.claim_folder(tmp_path / "linked", "owner")
        monkeypatch.setattr(os, "link", no_links)
        claim.claim_folder(tmp_path / "copied", "owner")
        with only_process_in(tmp_path), contextlib.closing(Journal(tmp_path / "journal")):
            pass
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    folders = {name: modes.pop(name) for name in ("linked", "copied", "journal")}
    assert len(modes) == 5 and set(modes.values()) == {mode}, modes
    assert set(folders.values()) == {0o777 & ~umask}


def test_a_limit_of_file_size_is_missing_space(tmp_path: Path) -> None:
    code = f"""
import pathlib, resource
from pipeline.errors import WriteError
from pipeline.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(pathlib.Path({str(tmp_path / "a")!r}), bytes(2000))
except WriteError as error:
    print(error.code, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout.startswith(f"73 {tmp_path / 'a'}: no space: 2000 bytes needed, and this user or process may not")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a value at line 1, column 1"),
        ("{", "expected a property name in double quotes at line 1, column 2"),
        ("[1 2]", "expected a ',' delimiter at line 1, column 4"),
        ("1 2", "extra data at line 1, column 3"),
        ('"a', "unterminated string starting at line 1, column 1"),
        ('"\\ud800"', "it contains an unpaired surrogate ('\\ud800')"),
    ],
)
def test_damaged_json_is_described_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert str(caught.value) == says


def test_fields_that_are_missing_or_of_another_type_are_described_without_python() -> None:
    assert why_malformed(KeyError("members")) == "'members' is missing"
    assert why_malformed(TypeError("list indices must be integers")) == "its structure is not as expected"
