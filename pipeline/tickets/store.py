"""Tickets in a folder on shared storage: written once and atomically, by one owner, ordered by the index inside each file."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pipeline.errors import DataError, IntegrityError, RunError, WriteError
from pipeline.files import cannot_write, sync_folder, write_atomically, write_durably
from pipeline.tickets.format import Provenance, Ticket, decode, encode, read_packed

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_OWNER_FILE = "owner.json"


@dataclass(frozen=True)
class TicketRef:
    """A ticket file that has been read and verified."""

    index: int
    path: Path
    content_digest: str
    provenance: Provenance


class TicketStore:
    """The tickets of one run. With ``owner`` (the run's name, unique among jobs) the folder is made and taken; without, it is only read.

    Raises WriteError when another run owns the folder, PermissionDenied when it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, owner: str | None = None) -> None:
        self.folder = Path(folder)
        self.owner = owner
        if owner is not None:
            _take(self.folder, owner)

    def save(self, ticket: Ticket) -> Path:
        """Writes ``ticket-<index>.safetensors``; called on one rank. The same ticket again is accepted, as after a resume.

        Raises WriteError (no space: path, needed, free; no partial file stays), IntegrityError when the index is taken by another
        ticket, NumericsError on values that are not finite.
        """
        assert self.owner is not None, "a store without an owner is only read"
        path = self._path(ticket.provenance.index)
        content = encode(ticket)
        if os.path.lexists(path):
            there, new = read_packed(path).content_digest, read_packed(content).content_digest
            if there != new:
                raise IntegrityError(
                    f"{path}: already there with content sha256 {there}, the ticket to publish has {new}",
                    do="use an empty ticket folder, or find out why the resumed run differs",
                )
            return path
        write_atomically(path, content)
        return path

    def list(self) -> list[TicketRef]:
        """The intact tickets, ordered by index. Every file is read and its hash verified; damaged ones are named, counted and left out.

        Raises IntegrityError when two different tickets claim one index, DataError when there is no such folder.
        """
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no ticket folder")
        names = sorted(path.name for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))
        tickets: dict[int, TicketRef] = {}
        num_damaged = 0
        for name in names:
            try:
                ref = _inspect(self.folder / name)
            except RunError as error:
                num_damaged += 1
                logger.warning("ticket left out: %s", error.what)
                continue
            other = tickets.setdefault(ref.index, ref)
            if other.content_digest != ref.content_digest:
                raise IntegrityError(f"{ref.path} and {other.path} are different tickets with the same index {ref.index}")
        if num_damaged:
            logger.warning("%d of %d ticket files in %s are not used", num_damaged, len(names), self.folder)
        return [tickets[index] for index in sorted(tickets)]

    def load(self, index: int) -> Ticket:
        """The ticket of that index. Raises DataError when there is none, IntegrityError when it is damaged."""
        if os.path.lexists(self._path(index)):
            ticket = decode(self._path(index))
            if ticket.provenance.index == index:
                return ticket
        for ref in self.list():  # the file has been renamed: only the index inside counts
            if ref.index == index:
                return decode(ref.path)
        raise DataError(f"{self.folder}: no ticket with index {index}")

    def _path(self, index: int) -> Path:
        assert index >= 0
        return self.folder / f"ticket-{index:03d}.safetensors"


def _inspect(path: Path) -> TicketRef:
    if not _FILE_NAME.fullmatch(path.name):
        raise IntegrityError(f"{path}: not a name for a ticket file")
    packed = read_packed(path)
    return TicketRef(packed.provenance.index, path, packed.content_digest, packed.provenance)


def _take(folder: Path, owner: str) -> None:
    """Makes the folder and puts our name on it; returns when it is there already."""
    claim = json.dumps({"owner": owner, "since": datetime.now(UTC).isoformat(timespec="seconds")}).encode()
    path = folder / _OWNER_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        _check_owner(path, owner)
        return
    except OSError as error:
        raise cannot_write(folder, error, num_bytes=len(claim)) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            write_durably(file, claim)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise cannot_write(path, error, num_bytes=len(claim)) from None
    sync_folder(folder)


def _check_owner(path: Path, owner: str) -> None:
    if not path.parent.is_dir():
        raise WriteError(f"{path.parent}: is there and is not a folder")
    for _ in range(10):  # a rank that comes at the same moment may find the file still empty
        try:
            claim = json.loads(_read_claim(path))
            there, since = claim["owner"], claim["since"]
            break
        except (ValueError, KeyError, TypeError):
            time.sleep(0.1)
    else:
        raise IntegrityError(f"{path}: cannot be read as the owner of this folder", do="remove it if no run uses the folder")
    if there != owner:
        raise WriteError(
            f"{path.parent}: belongs to run {str(there)[:80]!r} since {str(since)[:40]}, this is run {owner!r}",
            do="choose another output folder, or remove this one if that run is over and not needed",
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise cannot_write(path.parent, PermissionError(errno.EACCES, "Permission denied"), num_bytes=0)


def _read_claim(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read as the owner of this folder: {error.strerror}") from None
    with os.fdopen(descriptor, "rb") as file:
        return file.read(4096)
