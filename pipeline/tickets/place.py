"""Find and read what a user names as a ticket: a file, a run or a folder of tickets, a URL, a name of the zoo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pipeline import zoo
from pipeline.tickets.format import Ticket, decode
from pipeline.tickets.remote import fetched
from pipeline.tickets.store import TicketStore


@contextlib.contextmanager
def ticket_file(place: str) -> Iterator[Path]:
    """Yield the file of a ticket; a run or a folder stands for its last one. A copy from a URL is removed afterwards.

    Args:
        place: path of a file, run or folder; a URL that fsspec supports; or a name as
            :func:`pipeline.zoo.find_ticket` takes it.

    Raises:
        ConfigError: it is neither a path nor a name of the zoo.
        DataError: it does not exist, or has no tickets.
    """
    with fetched([place if "://" in place else str(zoo.ticket_file(place))]) as (path,):
        yield TicketStore(path).last() if path.is_dir() else path


def read_ticket(place: str) -> Ticket:
    """Read the ticket of :func:`ticket_file`.

    Raises:
        ConfigError: it is neither a path nor a name of the zoo.
        DataError: it does not exist, or has no tickets.
        IntegrityError: the ticket is damaged.
        PermissionDenied: it may not be read.
    """
    with ticket_file(place) as path:
        return decode(path)
