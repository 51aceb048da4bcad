"""What a topology update is asked to do, from the drop fraction and density that a schedule gives."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import PRUNE
from pipeline.sparse.strategy import Strategy


@dataclass(frozen=True)
class Request:
    """An update that changes something."""

    drop_fraction: float  # of the active weights, to be replaced
    num_active: int | None = None  # after it, over all layers; None: as many as before
    needs_scores: bool = True  # does anything grow?


def request_of(
    strategy: Strategy, drop_fraction: float | None, density: float | None, *, num_active: int, num_weights: int
) -> Request | None:
    """The update that ``drop_fraction`` and ``density`` (None: nothing is asked) mean for ``num_active`` of ``num_weights``.

    Returns None where nothing would change.

    Raises:
        ConfigError: outside [0, 1] and (0, 1], and for a density that the strategy cannot reach.
    """
    drop_fraction = drop_fraction or 0.0
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
