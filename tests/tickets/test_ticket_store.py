"""A folder of tickets: written whole or not at all, by one run, ordered by the index in the files."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.errors import DataError, IntegrityError, NumericsError, PermissionDenied, WriteError
from pipeline.evaluation import inputs
from pipeline.tickets import store as store_module
from pipeline.tickets.format import Ticket, decode, encode
from pipeline.tickets.store import Retention, TicketStore

MakeTicket = Callable[..., Ticket]


def test_save_list_load(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path / "run" / "tickets", owner="run-1")
    paths = [store.save(make_ticket(index, seed=index)) for index in (1, 0, 12)]
    assert [path.name for path in paths] == [
        "ticket-001.safetensors",
        "ticket-000.safetensors",
        "ticket-012.safetensors",
    ]
    refs = TicketStore(tmp_path / "run" / "tickets").list()  # as a reader
    assert [ref.index for ref in refs] == [0, 1, 12]
    assert [ref.path for ref in refs] == [paths[1], paths[0], paths[2]]
    assert refs[2].content_digest == make_ticket(12, seed=12).content_digest
    assert refs[2].provenance == make_ticket(12).provenance
    assert torch.equal(decode(refs[2].path).state["fc.weight"], make_ticket(12, seed=12).state["fc.weight"])
    assert sorted(path.name for path in store.folder.iterdir()) == ["owner.json", *sorted(path.name for path in paths)]
    with pytest.raises(DataError, match="is not a folder"):
        TicketStore(tmp_path / "elsewhere").list()


def test_the_index_inside_the_file_counts(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    store.save(make_ticket(0, seed=0)).rename(tmp_path / "z.safetensors")
    store.save(make_ticket(1, seed=1)).rename(tmp_path / "ticket-000.safetensors")
    os.utime(tmp_path / "z.safetensors", (2e9, 2e9))
    assert [(ref.index, ref.path.name) for ref in store.list()] == [(0, "z.safetensors"), (1, "ticket-000.safetensors")]
    for ref in store.list():
        assert ref.content_digest == make_ticket(ref.index, seed=ref.index).content_digest


def test_publishing_again(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    path = store.save(make_ticket(0))
    before = path.stat()
    assert TicketStore(tmp_path, owner="run-1").save(make_ticket(0)) == path  # the run has been resumed
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    with pytest.raises(IntegrityError, match=f"already exists with content sha256 {make_ticket(0).content_digest}"):
        store.save(make_ticket(0, seed=1))
    assert [ref.content_digest for ref in store.list()] == [make_ticket(0).content_digest]


def test_damaged_files_are_named_counted_and_left_out(
    make_ticket: MakeTicket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    for index in range(3):
        store.save(make_ticket(index))
    damaged = bytearray((tmp_path / "ticket-001.safetensors").read_bytes())
    damaged[-3] ^= 4
    (tmp_path / "ticket-001.safetensors").write_bytes(damaged)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "ticket-000.safetensors")
    os.mkfifo(tmp_path / "fifo.safetensors")
    (tmp_path / "Bad Name.safetensors").write_bytes(encode(make_ticket(7)))
    (tmp_path / ".ticket-004.safetensors.tmp").write_bytes(b"left behind by a killed process")
    with caplog.at_level(logging.WARNING):
        assert [ref.index for ref in store.list()] == [0, 2]
    messages = [record.getMessage() for record in caplog.records]
    assert messages[-1] == f"4 of 6 ticket files in {tmp_path} were left out"
    assert any("ticket-001.safetensors" in message and message.count("sha256") == 1 for message in messages)
    assert any("link.safetensors" in message for message in messages) and any("fifo" in message for message in messages)


def test_two_tickets_with_one_index(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    store.save(make_ticket(0))
    shutil.copy(tmp_path / "ticket-000.safetensors", tmp_path / "copy.safetensors")
    assert [ref.index for ref in store.list()] == [0]
    (tmp_path / "other.safetensors").write_bytes(encode(make_ticket(0, seed=1)))
    with pytest.raises(IntegrityError, match="different tickets with the same index 0") as error:
        store.list()
    assert error.value.do == "remove one of them from the folder"


def test_a_folder_of_another_run_is_refused(make_ticket: MakeTicket, tmp_path: Path) -> None:
    TicketStore(tmp_path / "t", owner="run-1").save(make_ticket(0))
    with pytest.raises(
        WriteError, match=r"has belonged to run 'run-1' since 20\d\d-\d\d-\d\dT.*, but this is run 'run-2'"
    ):
        TicketStore(tmp_path / "t", owner="run-2")
    TicketStore(tmp_path / "t", owner="run-1")
    assert len(TicketStore(tmp_path / "t").list()) == 1


def test_an_unreadable_owner_is_refused(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"owner\.json: does not name the owner"):
        TicketStore(tmp_path, owner="run-1")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file: is not a folder"):
        TicketStore(tmp_path / "file", owner="run-1")


def test_of_two_runs_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    code = "import sys; from pipeline.tickets.store import TicketStore; TicketStore(sys.argv[1], owner=sys.argv[2])"
    owners = ["run-1", "run-2"]
    processes = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path / "t", owner], stderr=subprocess.PIPE)
        for owner in owners
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1]
    assert b"WriteError" in errors[0] + errors[1]


def test_values_that_are_not_finite_leave_no_file(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    ticket = make_ticket(0)
    ticket.state["fc.bias"][0] = float("nan")
    with pytest.raises(NumericsError):
        store.save(ticket)
    assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]


def test_retention_keeps_the_last_and_the_first(make_ticket: MakeTicket, tmp_path: Path) -> None:
    store = TicketStore(tmp_path / "a", owner="run-1", retention=Retention(last=2))
    for index in range(5):
        store.save(make_ticket(index))
        assert [ref.index for ref in store.list()] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]][index]
    store = TicketStore(tmp_path / "b", owner="run-1", retention=Retention(last=1, first=False))
    for index in range(3):
        store.save(make_ticket(index))
    assert [ref.index for ref in store.list()] == [2]


def test_a_resumed_run_retires_what_it_publishes_again(make_ticket: MakeTicket, tmp_path: Path) -> None:
    keeps = Retention(last=2)
    assert [[index for index in range(newest + 1) if keeps.keeps(index, newest)] for newest in (0, 1, 2, 4)] == [
        *([0], [0, 1]),
        *([0, 1, 2], [0, 3, 4]),
    ]
    store = TicketStore(tmp_path, owner="run-1", retention=Retention(last=1))
    for index in (0, 1, 2, 3, 1, 2):  # from an older checkpoint, before ticket 1
        store.save(make_ticket(index))
    assert [ref.index for ref in store.list()] == [0, 2, 3]
    store.save(make_ticket(3))
    assert [ref.index for ref in store.list()] == [0, 3]


def test_a_ticket_that_goes_while_the_folder_is_listed_is_no_damage(
    make_ticket: MakeTicket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = TicketStore(tmp_path, owner="run-1")
    paths = [store.save(make_ticket(index)) for index in range(2)]
    inspect = store_module._inspect

    def retired(path: Path) -> store_module.TicketRef:
        paths[0].unlink(missing_ok=True)
        return inspect(path)

    monkeypatch.setattr(store_module, "_inspect", retired)
    assert [ref.index for ref in TicketStore(tmp_path).list()] == [1]
    assert not caplog.records


def test_in_background_training_goes_on_and_the_snapshot_is_what_is_saved(
    make_ticket: MakeTicket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), store_module.write_atomically

    def wait_and_write(path: Path, content: bytes) -> None:
        assert may_write.wait(60)
        write(path, content)

    monkeypatch.setattr(store_module, "write_atomically", wait_and_write)
    with TicketStore(tmp_path, owner="run-1", in_background=True) as store:
        path = store.save(make_ticket(0))
        assert not path.exists()  # and yet we are here
        may_write.set()
        store.save(make_ticket(1))
        assert path.exists()  # one at a time
    assert [ref.index for ref in TicketStore(tmp_path).list()] == [0, 1]


def test_errors_of_the_background_surface(
    make_ticket: MakeTicket, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = make_ticket(0)
    bad.state["fc.bias"][0] = float("nan")
    store = TicketStore(tmp_path, owner="run-1", in_background=True)
    store.save(bad)
    with pytest.raises(NumericsError, match=r"fc\.bias"):
        store.save(make_ticket(1))  # raises the error of the one before
    store.save(make_ticket(1))
    store.finish()
    assert [ref.index for ref in store.list()] == [1]
    with pytest.raises(NumericsError), store:
        store.save(bad)
    with pytest.raises(KeyError), store:  # the error of the block is raised; the other one is not lost
        store.save(bad)
        raise KeyError
    assert "a ticket could not be saved: dense/fc.bias" in caplog.text


def test_a_run_that_ends_by_an_error_leaves_its_ticket(make_ticket: MakeTicket, tmp_path: Path) -> None:
    with pytest.raises(KeyError), TicketStore(tmp_path, owner="run-1", in_background=True) as store:
        store.save(make_ticket(0))
        raise KeyError
    assert [ref.index for ref in TicketStore(tmp_path).list()] == [0]


def _can_mount(folder: Path) -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", folder]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk(make_ticket: MakeTicket, tmp_path: Path) -> None:
    """On a real file system of 16 kB, in a mount namespace that ends with the process."""
    if not _can_mount(tmp_path):
        pytest.skip("needs the right to mount a small file system")
    (tmp_path / "ticket").write_bytes(encode(make_ticket(0)))
    code = f"""
import os
from pathlib import Path
from pipeline.errors import WriteError
from pipeline.tickets.format import decode
from pipeline.evaluation import inputs
from pipeline.tickets import store as store_module
from pipeline.tickets.store import Retention, TicketStore
ticket = decode("{tmp_path}/ticket")
store = TicketStore("{tmp_path}/full", owner="run-1")
Path("{tmp_path}/full/other").write_bytes(bytes(16384 - 4096 - 1))
try:
    store.save(ticket)
except WriteError as error:
    print(error.what, sorted(os.listdir("{tmp_path}/full")), sep="|")
"""
    (tmp_path / "full").mkdir()
    mounted = f'mount -t tmpfs -o size=16k tmpfs "{tmp_path}/full" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    what, _, names = out.strip().partition("|")
    size = (tmp_path / "ticket").stat().st_size
    assert what == f"{tmp_path}/full/ticket-000.safetensors: no space: {size} bytes needed, 0 free"
    assert names == "['other', 'owner.json']"


def test_a_read_only_folder_is_refused_at_the_start(tmp_path: Path) -> None:
    if not _can_mount(tmp_path):
        pytest.skip("needs the right to mount a small file system")
    code = f"""
from pipeline.errors import PermissionDenied
from pipeline.evaluation import inputs
from pipeline.tickets import store as store_module
from pipeline.tickets.store import Retention, TicketStore
try:
    TicketStore("{tmp_path}/new", owner="run-1")
except PermissionDenied as error:
    print(error.what)
"""
    mounted = f'mount -t tmpfs -o ro tmpfs "{tmp_path}" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mounted, "sh", sys.executable, "-c", code]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert out.strip() == f"{tmp_path}/new: user {os.geteuid()} may not write here (Read-only file system)"
    assert PermissionDenied.code == 77


def test_a_reader_takes_a_run_its_folder_or_a_file(make_ticket: MakeTicket, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    folder = run / "tickets"
    store = TicketStore(folder, owner="run-1")
    paths = [store.save(make_ticket(index, seed=index)) for index in (0, 1)]
    for place in (run, folder):
        assert [ref.path for ref in TicketStore(place).list()] == paths
        assert TicketStore(place).last() == paths[1]
    assert [ref.index for ref in TicketStore(paths[0]).list()] == [0]
    runs = inputs.open_runs([run, paths[0].rename(tmp_path / "first.safetensors")])
    assert [(each.label, len(each.refs)) for each in runs] == [("x", 1), ("first", 1)]
    with pytest.raises(DataError, match=r"contains no intact ticket; do: pass a run, a folder"):
        TicketStore(tmp_path / "runs").last()
