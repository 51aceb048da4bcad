"""Tickets are sparse networks as files: ``encode`` and ``decode`` convert them, a ``TicketStore`` keeps a folder.

``read_verified`` and ``VerifiedTicket`` need numpy only, everything else torch, numpy and safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.tickets.format import Ticket, decode, encode, ticket_of
    from pipeline.tickets.network import Network
    from pipeline.tickets.own import save_ticket
    from pipeline.tickets.provenance import Provenance
    from pipeline.tickets.store import TicketRef, TicketStore
    from pipeline.tickets.verify import VerifiedTicket, read_verified

__all__ = [
    "Network",
    "Provenance",
    "Ticket",
    "TicketRef",
    "TicketStore",
    "VerifiedTicket",
    "decode",
    "encode",
    "read_verified",
    "save_ticket",
    "ticket_of",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Network": "pipeline.tickets.network",
        "Provenance": "pipeline.tickets.provenance",
        "Ticket": "pipeline.tickets.format",
        "TicketRef": "pipeline.tickets.store",
        "TicketStore": "pipeline.tickets.store",
        "VerifiedTicket": "pipeline.tickets.verify",
        "decode": "pipeline.tickets.format",
        "encode": "pipeline.tickets.format",
        "read_verified": "pipeline.tickets.verify",
        "save_ticket": "pipeline.tickets.own",
        "ticket_of": "pipeline.tickets.format",
    },
)
