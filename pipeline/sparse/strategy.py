"""A sparse training method is a value: prune criterion, grow criterion, scope, distribution."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.sparse.criteria import READS_GRADIENT


@dataclass(frozen=True)
class Strategy:
    """One method. ``grow`` None means that the topology never changes."""

    grow: str | None
    prune: str = "magnitude"
    scope: str = "layer"
    distribution: str = "erk"
    min_active: int = 1  # active weights that global pruning leaves in every layer

    @property
    def reads_gradient(self) -> bool:
        """True when growth needs the dense gradient on update steps."""
        return self.grow in READS_GRADIENT


METHODS: dict[str, Strategy] = {
    "dense": Strategy(grow=None, distribution="uniform"),
    "static": Strategy(grow=None),
    "set": Strategy(grow="random"),  # SET; with a long update interval and a cosine drop fraction, SET-ITOP
    "rigl": Strategy(grow="gradient"),  # RigL; likewise RigL-ITOP
}
SCOPES = ("layer", "global")
