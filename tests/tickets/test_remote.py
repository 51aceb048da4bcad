"""Tickets in an object store: fsspec's memory, and local files by a URL that goes through fsspec."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import DataError, IntegrityError, ServiceError, WriteError
from pipeline.tickets.__main__ import main
from pipeline.tickets.format import Ticket, decode, encode
from pipeline.tickets.remote import RemoteFolder, fetched
from pipeline.tickets.store import Retention, TicketStore

MakeTicket = Callable[..., Ticket]


@pytest.fixture(params=["memory", "local"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"memory://{uuid.uuid4().hex}/run/tickets"
        if request.param == "memory"
        else f"local://{tmp_path}/remote/run/tickets"
    )


def names(url: str) -> list[str]:
    return RemoteFolder(url).names()


def test_what_is_saved_is_there_too_and_can_be_looked_at(
    make_ticket: MakeTicket, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with TicketStore(tmp_path / "t", owner="run-1", in_background=True, copy_to=url) as store:
        for index in (0, 1):
            store.save(make_ticket(index, seed=index))
    with fetched([url, f"{url}/ticket-001.safetensors", f"file://{tmp_path}/t", str(tmp_path / "t")]) as (
        copy,
        file,
        *folders,
    ):
        assert folders == [tmp_path / "t"] * 2 and copy.parts[-2:] == ("run", "tickets")
        refs = TicketStore(copy).list()
        assert [ref.content_digest for ref in refs] == [
            make_ticket(index, seed=index).content_digest for index in (0, 1)
        ]
        assert decode(file).content_digest == refs[1].content_digest
    assert not copy.exists() and not file.exists()
    assert main(["ls", "--json", url]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in listed] == [f"{url}/ticket-00{index}.safetensors" for index in (0, 1)]
    assert main(["verify", url]) == main(["show", f"{url}/ticket-000.safetensors"]) == 0
    assert main(["diff", *(f"{url}/ticket-00{index}.safetensors" for index in (0, 1))]) == 0


def test_publishing_again_and_retiring(make_ticket: MakeTicket, tmp_path: Path, url: str) -> None:
    TicketStore(tmp_path / "t", owner="run-1").save(make_ticket(0))  # killed before it was copied
    store = TicketStore(tmp_path / "t", owner="run-1", retention=Retention(last=1, first=False), copy_to=url)
    for index in (0, 0, 1):
        store.save(make_ticket(index))
    assert names(url) == ["ticket-001.safetensors"] == [ref.path.name for ref in store.list()]
    (tmp_path / "t" / "ticket-001.safetensors").unlink()
    with pytest.raises(IntegrityError, match="already exists with different content"):
        store.save(make_ticket(1, seed=1))


def test_the_url_of_another_run_is_refused(make_ticket: MakeTicket, tmp_path: Path, url: str) -> None:
    TicketStore(tmp_path / "a", owner="run-1", copy_to=url).save(make_ticket(0))
    with pytest.raises(
        WriteError, match=r"has belonged to run 'run-1' since 20\d\d-\d\d-\d\dT.*, but this is run 'run-2'"
    ):
        TicketStore(tmp_path / "b", owner="run-2", copy_to=url)
    TicketStore(tmp_path / "a", owner="run-1", copy_to=url).save(make_ticket(1))  # resumed
    assert len(names(url)) == 2


def test_a_claim_that_another_run_overwrites_at_that_moment_is_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store without exclusive creation, the other claim lands before we read ours back."""
    first, second = RemoteFolder(url), RemoteFolder(url)
    read = first.read

    def overtaken(name: str) -> bytes | None:
        there = read(name)
        if there is None:  # the first look: it is not claimed
            return None
        second.files.rm_file(second._path(name))
        second.claim("run-2")
        return read(name)

    monkeypatch.setattr(first, "read", overtaken)
    with pytest.raises(WriteError, match="belonged to run 'run-2'"):
        first.claim("run-1")


class WithoutModes(MemoryFileSystem):  # type: ignore[misc]
    """Like backends that do not know ``mode``: existing objects are overwritten."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **more: Any) -> None:
        super().pipe_file(path, value, mode="overwrite", **more)


def test_a_claim_is_not_written_over_where_nothing_can_be_created_exclusively() -> None:
    url = f"memory://{uuid.uuid4().hex}/run/tickets"
    first, second = RemoteFolder(url), RemoteFolder(url)
    first.files = second.files = WithoutModes()
    first.claim("run-1")
    claim = first.read("owner.json")
    with pytest.raises(WriteError, match="belonged to run 'run-1'"):
        second.claim("run-2")
    first.claim("run-1")  # resumed
    assert first.read("owner.json") == claim


def test_a_damaged_object_is_named_and_left_out(
    make_ticket: MakeTicket, url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RemoteFolder(url)
    folder.claim("run-1")
    folder.publish("ticket-000.safetensors", encode(make_ticket(0)))
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/ticket-001.safetensors", encode(make_ticket(1))[:-1])
    with fetched([url]) as (copy,), caplog.at_level(logging.WARNING):
        assert [ref.index for ref in TicketStore(copy).list()] == [0]
    assert any("ticket-001.safetensors" in record.getMessage() for record in caplog.records)
    assert main(["verify", url]) == 78


def test_stores_that_cannot_be_reached() -> None:
    with pytest.raises(DataError, match="memory://nowhere: does not exist"), fetched(["memory://nowhere"]):
        pass
    with pytest.raises(ServiceError, match="Protocol not known: nowhere"):
        RemoteFolder("nowhere://bucket")
    with pytest.raises(ServiceError, match="s3fs"):
        RemoteFolder("s3://bucket/run")
