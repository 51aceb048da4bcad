"""What a topology update that is due means for the weights at hand."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import PRUNE
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.timing import DueUpdate


@dataclass(frozen=True)
class Request:
    """An update that changes something."""

    drop_fraction: float  # of the active weights, to be replaced
    num_active: int | None = None  # after it, over all layers; None: as many as before
    needs_scores: bool = True  # does anything grow?


def request_of(strategy: Strategy, update: DueUpdate, *, num_active: int, num_weights: int) -> Request | None:
    """What ``update`` means for ``num_active`` of ``num_weights``. Returns None where nothing would change.

    Raises:
        ConfigError: for a drop fraction outside [0, 1], a density outside (0, 1], and a density that
            the strategy cannot reach.
    """
    drop_fraction, density = update.drop_fraction, update.density
    if not 0 <= drop_fraction <= 1:
        raise ConfigError(f"drop fraction {drop_fraction} is not in [0, 1]", do="correct the schedule")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density {density} is not in (0, 1]", do="correct the schedule")
    target = None if density is None else round(density * num_weights)
    changes_density = target is not None and target != num_active
    rises = target is not None and target > num_active
    if changes_density and strategy.structure != "none":
        raise ConfigError(
            f"density {density}: structure {strategy.structure!r} has only one", do="leave the density as it is"
        )
    if rises and strategy.grow is None:
        present = num_active / num_weights
        raise ConfigError(
            f"density {density} is above the present {present:g}, and nothing grows", do="choose a method that grows"
        )
    replaces = drop_fraction > 0 and strategy.grow is not None and PRUNE[strategy.prune] is not None
    return Request(drop_fraction, target, rises or replaces) if changes_density or replaces else None
