"""Keep tickets in a folder on shared storage: written once, atomically and by one owner.

Tickets are ordered by the index inside each file. Listing them needs no torch, so that a wrong
folder is reported within a second.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from pipeline.errors import DataError, IntegrityError, RunError
from pipeline.files import sync_folder, write_atomically
from pipeline.tickets.claim import claim_folder
from pipeline.tickets.provenance import Provenance
from pipeline.tickets.remote import RemoteFolder, ticket_names
from pipeline.tickets.verify import OtherVersionError, read_verified

if TYPE_CHECKING:
    from pipeline.tickets.format import Ticket

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class Retention:
    """Which tickets are kept when a new one is saved."""

    last: int | None = None  # number of newest tickets to keep; None: all
    first: bool = True  # keep the first as well: superposition starts from it

    def keeps(self, index: int, newest: int) -> bool:
        """Return whether a ticket is kept once ``newest`` has been saved."""
        return self.last is None or index > newest - self.last or (self.first and index == 0)


@dataclass(frozen=True)
class TicketRef:
    """A ticket file that has been read and verified."""

    index: int
    path: Path
    content_digest: str
    provenance: Provenance


class TicketStore:
    """The tickets of one run.

    Args:
        folder: where the tickets are. Without an owner also a run, for its folder ``tickets``, or one
            ticket file.
        owner: name of the run, unique among jobs; the folder is created and claimed for it. None
            only reads the folder.
        retention: which tickets are kept when a new one is saved.
        in_background: a thread encodes and writes one ticket at a time while training continues.
            Its errors are raised by the next :meth:`save` or :meth:`finish`; a ``with`` block
            always waits for the last ticket.
        copy_to: URL of any kind that fsspec supports, such as ``s3://bucket/run``; it is claimed
            too, and every ticket in the folder is copied there.

    Raises:
        WriteError: another run owns the folder or the URL.
        PermissionDenied: the folder may not be written.
        ServiceError: the store of the URL cannot be reached.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        owner: str | None = None,
        retention: Retention = Retention(),
        in_background: bool = False,
        copy_to: str | None = None,
    ) -> None:
        self.folder = Path(folder) if owner is not None else tickets_in(Path(folder))
        self.owner = owner
        self.retention = retention
        self._executor = ThreadPoolExecutor(1, "tickets") if in_background else None
        self._pending: Future[None] | None = None
        self._copy = RemoteFolder(copy_to) if copy_to else None
        self.left_out: list[RunError] = []  # the error of every unusable file that the last list() found
        if owner is not None:
            claim_folder(self.folder, owner)
            if self._copy is not None:
                self._copy.claim(owner)

    def save(self, ticket: Ticket) -> Path:
        """Write ``ticket-<index>.safetensors``; called on one rank.

        Saving an equal ticket again, as after a resume, is accepted. A ticket is a snapshot
        (`ticket_of` copies), so the network may change immediately.

        Returns:
            The path of the ticket.

        Raises:
            WriteError: the file cannot be written; no partial file is left.
            IntegrityError: a different ticket has this index.
            NumericsError: a value is not finite.
        """
        assert self.owner is not None, "a store without an owner cannot be written"
        self.finish()
        if self._executor is None:
            self._publish(ticket)
        else:
            self._pending = self._executor.submit(self._publish, ticket)
        return self._path(ticket.provenance.index)

    def finish(self) -> None:
        """Wait until the last ticket is on disk; raises the errors of :meth:`save`."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except RunError as second:
            if error is None:
                raise
            logger.error("a ticket could not be saved: %s", second)  # the first error is the one to report

    def _publish(self, ticket: Ticket) -> None:
        from pipeline.tickets.format import encode

        path = self._path(ticket.provenance.index)
        content = encode(ticket)
        if os.path.lexists(path):
            there = read_verified(path)
            # written as the file there is: a version before this one may have saved the same ticket
            new = dataclasses.replace(ticket, format=there.format).content_digest
            if there.content_digest != new:
                raise IntegrityError(
                    f"{path}: already exists with content sha256 {there.content_digest}, but the new ticket has {new}",
                    do="use an empty ticket folder, or find out why the resumed run differs",
                )
            content = there.content
        else:
            write_atomically(path, content)
        if self._copy is not None:
            # even if the file existed: the run may have been killed before it was copied
            self._copy.publish(path.name, content)
        self._retire(ticket.provenance.index)

    def _retire(self, newest: int) -> None:
        """Remove tickets that the retention does not keep, after the new one has been written."""
        retired = [index for index in range(newest) if not self.retention.keeps(index, newest)]
        for index in retired:
            self._path(index).unlink(missing_ok=True)
            if self._copy is not None:
                self._copy.remove(self._path(index).name)
        if retired:
            sync_folder(self.folder)

    def list(self) -> list[TicketRef]:
        """List the intact tickets, ordered by index.

        Every file is read and its hash verified; damaged ones are reported and left out.

        Raises:
            IntegrityError: two different tickets have the same index.
            DataError: the folder does not exist.
        """
        self.finish()
        if self.owner is None and self.folder.is_file():
            return [_inspect(self.folder)]
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: is not a folder", do="pass a folder of tickets")
        names = ticket_names(path.name for path in self.folder.iterdir())
        tickets: dict[int, TicketRef] = {}
        self.left_out = []
        for name in names:
            try:
                ref = _inspect(self.folder / name)
            except RunError as error:
                if not os.path.lexists(self.folder / name):
                    continue  # its owner has removed it meanwhile
                self.left_out.append(error)
                logger.warning("ticket left out: %s", error.what)
                continue
            other = tickets.setdefault(ref.index, ref)
            if other.content_digest != ref.content_digest:
                raise IntegrityError(
                    f"{ref.path} and {other.path} are different tickets with the same index {ref.index}",
                    do="remove one of them from the folder",
                )
        if self.left_out:
            logger.warning("%d of %d ticket files in %s were left out", len(self.left_out), len(names), self.folder)
        return [tickets[index] for index in sorted(tickets)]

    def last(self) -> Path:
        """Return the file of the ticket with the highest index.

        Raises:
            DataError: there is no intact ticket.
        """
        found = self.list()
        if not found:
            raise no_tickets(self)
        return found[-1].path

    def _path(self, index: int) -> Path:
        assert index >= 0
        return self.folder / f"ticket-{index:03d}.safetensors"


def tickets_in(place: Path) -> Path:
    """Return the folder of tickets of a run, ``place/tickets``; any other folder or file is returned as it is."""
    within = place / "tickets"
    return within if within.is_dir() and not any(place.glob("*.safetensors")) else place


def no_tickets(store: TicketStore) -> DataError:
    """Return the error for a folder in which :meth:`TicketStore.list` has found no ticket."""
    what = f"{store.folder}: contains no intact ticket"
    if not (left_out := store.left_out):
        return DataError(what, do="pass a run, a folder that contains ticket-….safetensors files, or one of these")
    number = len(left_out)
    unusable = "the only candidate is unusable" if number == 1 else f"all {number} candidates are unusable; the first"
    first = "use the version of ticketworks that wrote them"
    if not isinstance(left_out[0], OtherVersionError):
        first = "copy the tickets again"
    return DataError(f"{what}; {unusable}: {left_out[0].what}", do=f"{first}, or pass another folder")


def _inspect(path: Path) -> TicketRef:
    if not _FILE_NAME.fullmatch(path.name):
        raise IntegrityError(f"{path}: is not a valid name for a ticket file")
    ticket = read_verified(path)
    return TicketRef(ticket.provenance.index, path, ticket.content_digest, ticket.provenance)
