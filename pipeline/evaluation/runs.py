"""The tickets of one folder, as an evaluation knows them before it opens any. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.tickets.store import TicketRef


@dataclass(frozen=True)
class TicketRun:
    """The tickets of one folder, in order of index.

    ``label`` tells runs apart in names of rows; empty when there is one run only.
    """

    refs: Sequence[TicketRef]
    label: str = ""

    @property
    def is_dense(self) -> bool:
        """A run that only serves as the dense reference: it is in no ensemble."""
        return all(ref.provenance.method == "dense" for ref in self.refs)

    def row_of(self, ref: TicketRef) -> str:
        """The name of a ticket's row."""
        return self.name(f"{'dense' if self.is_dense else 'ticket'}-{ref.index}")

    def name(self, what: str) -> str:
        return f"{self.label}-{what}" if self.label else what
