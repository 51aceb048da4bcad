"""The tickets of one folder, listed for an evaluation but not yet loaded. Does not need torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.tickets.store import TicketRef


@dataclass(frozen=True)
class TicketRun:
    """The tickets of one folder, in order of index.

    ``label`` prefixes the names of the run's rows; it is empty if there is only one run.
    """

    refs: Sequence[TicketRef]
    label: str = ""
    # Other states of a training whose tickets are another run: they have ensembles of their own, and
    # do not count for the diversity of the tickets.
    is_apart: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether the run is a dense reference, which is in no ensemble."""
        return all(ref.provenance.method == "dense" for ref in self.refs)

    def row_of(self, ref: TicketRef) -> str:
        """Return the name of a ticket's row."""
        return self.name(f"{'dense' if self.is_dense else 'ticket'}-{ref.index}")

    def name(self, what: str) -> str:
        """Return ``what``, prefixed by the run's label if it has one."""
        return f"{self.label}-{what}" if self.label else what
