"""Tickets in a folder on shared storage: written once and atomically, by one owner, ordered by the index inside each file.

What is there is listed without torch, so that a wrong folder is named in a second.
"""

from __future__ import annotations

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
from pipeline.tickets.claim import take
from pipeline.tickets.provenance import Provenance
from pipeline.tickets.remote import RemoteFolder
from pipeline.tickets.verify import read_verified

if TYPE_CHECKING:
    from pipeline.tickets.format import Ticket

logger = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,95}")


@dataclass(frozen=True)
class Retention:
    """Which tickets stay when a new one is saved: the ``last`` so many (None: all), and the first, which superposition starts from."""

    last: int | None = None
    first: bool = True

    def keeps(self, index: int, newest: int) -> bool:
        """Whether the ticket stays once ``newest`` is there."""
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

    With ``owner`` (the run's name, unique among jobs) the folder is made and taken; without, it is
    only read.

    ``in_background``: a thread encodes and writes while training goes on, one ticket at a time. Its
    errors are raised by the next
    :meth:`save` or :meth:`finish`; used with ``with``, no way out of the block leaves a ticket unsaved.

    ``copy_to``: a URL that fsspec knows, such as ``s3://bucket/run``; taken too, and every ticket
    is put there when it is in the folder.

    Raises WriteError when another run owns the folder or the URL, PermissionDenied when it cannot
    be written, ServiceError when the store of the URL cannot be reached.
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
        self.folder = Path(folder)
        self.owner = owner
        self.retention = retention
        self._executor = ThreadPoolExecutor(1, "tickets") if in_background else None
        self._pending: Future[None] | None = None
        self._copy = RemoteFolder(copy_to) if copy_to else None
        self.left_out: list[str] = []  # why, for every damaged file that the last list() met
        if owner is not None:
            take(self.folder, owner)
            if self._copy is not None:
                self._copy.take(owner)

    def save(self, ticket: Ticket) -> Path:
        """Writes ``ticket-<index>.safetensors``; called on one rank.

        The same ticket again is accepted, as after a resume.

        A ticket is a snapshot (`ticket_of` copies), so that the network may change at once.

        Raises WriteError (no space: path, needed, free; no partial file stays), IntegrityError when
        the index is taken by another ticket, NumericsError on values that are not finite.
        """
        assert self.owner is not None, "a store without an owner is only read"
        self.finish()
        if self._executor is None:
            self._publish(ticket)
        else:
            self._pending = self._executor.submit(self._publish, ticket)
        return self._path(ticket.provenance.index)

    def finish(self) -> None:
        """Wait until the last ticket is on the disk. Raises what :meth:`save` raises."""
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
            there, new = read_verified(path).content_digest, read_verified(content).content_digest
            if there != new:
                raise IntegrityError(
                    f"{path}: already there with content sha256 {there}, the ticket to publish has {new}",
                    do="use an empty ticket folder, or find out why the resumed run differs",
                )
        else:
            write_atomically(path, content)
        if self._copy is not None:
            self._copy.publish(
                path.name, content
            )  # also one that was in the folder before: the run may have been killed in between
        self._retire(ticket.provenance.index)

    def _retire(self, newest: int) -> None:
        """Remove what the retention does not keep; a ticket that has been published is there before any goes."""
        retired = [index for index in range(newest) if not self.retention.keeps(index, newest)]
        for index in retired:
            self._path(index).unlink(missing_ok=True)
            if self._copy is not None:
                self._copy.remove(self._path(index).name)
        if retired:
            sync_folder(self.folder)

    def list(self) -> list[TicketRef]:
        """The intact tickets, ordered by index.

        Every file is read and its hash verified; damaged ones are named, counted and left out.

        Raises IntegrityError when two different tickets claim one index, DataError when there is no such folder.
        """
        self.finish()
        if not self.folder.is_dir():
            raise DataError(f"{self.folder}: no ticket folder")
        names = sorted(path.name for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))
        tickets: dict[int, TicketRef] = {}
        self.left_out = []
        for name in names:
            try:
                ref = _inspect(self.folder / name)
            except RunError as error:
                if not os.path.lexists(self.folder / name):
                    continue  # its owner has retired it meanwhile
                self.left_out.append(error.what)
                logger.warning("ticket left out: %s", error.what)
                continue
            other = tickets.setdefault(ref.index, ref)
            if other.content_digest != ref.content_digest:
                raise IntegrityError(
                    f"{ref.path} and {other.path} are different tickets with the same index {ref.index}"
                )
        if self.left_out:
            logger.warning("%d of %d ticket files in %s are not used", len(self.left_out), len(names), self.folder)
        return [tickets[index] for index in sorted(tickets)]

    def _path(self, index: int) -> Path:
        assert index >= 0
        return self.folder / f"ticket-{index:03d}.safetensors"


def _inspect(path: Path) -> TicketRef:
    if not _FILE_NAME.fullmatch(path.name):
        raise IntegrityError(f"{path}: not a name for a ticket file")
    ticket = read_verified(path)
    return TicketRef(ticket.provenance.index, path, ticket.content_digest, ticket.provenance)
