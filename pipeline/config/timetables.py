"""The timetables: which phases a run has, in which order. A table with one row per timetable.

``pipeline.config.checks`` reads from a row what the configuration must have, ``pipeline.plan``
turns its phases into steps. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple


class PhaseOutline(NamedTuple):
    """One phase of a timetable."""

    name: str
    section: str  # of ``plan``, with the settings of the phase: "exploration" or "refinement"


def exploration_only(num_refinements: int) -> list[PhaseOutline]:
    """Return the one exploration phase of dense, static, SET, RigL and ITOP."""
    return [PhaseOutline("exploration", "exploration")]


def exploration_and_refinements(num_refinements: int) -> list[PhaseOutline]:
    """Return the phases of EDST ensembles and Sup-tickets: exploration, then the refinements."""
    refinements = [PhaseOutline(f"refinement-{1 + index}", "refinement") for index in range(num_refinements)]
    return [*exploration_only(num_refinements), *refinements]


@dataclass(frozen=True)
class Timetable:
    """A row of :data:`TIMETABLES`."""

    phases: Callable[[int], list[PhaseOutline]]  # takes ``plan.num_refinements``
    about: str  # what it is and what it needs, for the configuration reference
    # which methods it is for: those that change masks, those that have fixed masks, or the dense one
    methods: Literal["changing", "fixed", "dense"] = "changing"
    has_refinements: bool = False  # needs ``plan.refinement``; exploration may end without a ticket
    needs_first_ticket: bool = False  # exploration ends with a ticket all the same


TIMETABLES = {
    "dense": Timetable(
        exploration_only,
        "one phase without a mask; needs `sparsity.method: dense` and `sparsity.density: 1`",
        methods="dense",
    ),
    "static": Timetable(
        exploration_only,
        "one phase whose mask never changes; needs `sparsity.method: static`, or "
        "one that chooses masks at initialisation (`snip`, `grasp`, `synflow`, `magnitude_init`)",
        methods="fixed",
    ),
    "itop": Timetable(
        exploration_only,
        "one exploration phase with a ticket at its end, for SET, RigL, ITOP and the other methods that change masks; "
        "needs such a method and an `update_interval`, from the method or from `plan.exploration`",
    ),
    "edst": Timetable(
        exploration_and_refinements,
        "exploration, then `plan.num_refinements` refinement phases that each end with a ticket (EDST ensembles); "
        "needs `plan.refinement` with an `opening_drop` or an `update_interval`; exploration ends with a ticket unless "
        "`plan.exploration.ticket` is false",
        has_refinements=True,
    ),
    "sup_tickets": Timetable(
        exploration_and_refinements,
        "as `edst`, but exploration always ends with a ticket, from which superposition starts (Sup-tickets)",
        has_refinements=True,
        needs_first_ticket=True,
    ),
}
