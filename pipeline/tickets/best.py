"""The best ticket of a phase so far, for a choice by accuracy on held-out images. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HELD_OUT_TOP1 = "held_out_top1"  # key of a provenance's ``extra``


@dataclass
class BestTicket:
    """Of the states with the fewest active weights, the first with the highest accuracy.

    The density of a phase may fall, and a denser state is not what the phase is for. Ties keep the
    earlier state. Equal on all ranks, except for ``content``.

    Args:
        held_out_digest: identity of the images that it is chosen with; empty: nothing is chosen.
    """

    held_out_digest: str = ""
    top1: float = -1.0  # fraction of the held-out images; -1: there is no state yet
    num_active: int = 0  # active sparse weights
    content: bytes = b""  # of the ticket's file; on rank 0 only

    def is_beaten_by(self, top1: float, num_active: int) -> bool:
        """Return whether a later state takes the place of this one."""
        return self.top1 < 0 or (num_active, -top1) < (self.num_active, -self.top1)

    def keep(self, top1: float, num_active: int, content: bytes) -> None:
        """Keep a state that beats this one."""
        self.top1, self.num_active, self.content = top1, num_active, content

    def clear(self) -> None:
        """Begin a phase."""
        self.keep(-1.0, 0, b"")

    def numbers(self) -> dict[str, Any]:
        """Return everything but the content."""
        return {"held_out_digest": self.held_out_digest, "top1": self.top1, "num_active": self.num_active}
