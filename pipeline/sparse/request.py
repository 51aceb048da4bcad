"""A topology update: what it is to do, once its growth has been scored, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.sparse.criteria import PRUNE, GrowthStage
from pipeline.sparse.strategy import Strategy
from pipeline.sparse.timing import DueUpdate


@dataclass(frozen=True)
class Request:
    """A topology update that changes something."""

    drop_fraction: float  # share of the active weights to replace, in [0, 1]
    num_active: int | None = None  # active weights of all layers after the update; None: unchanged
    needs_scores: bool = True  # whether any weight grows


@dataclass(frozen=True)
class ScoredUpdate:
    """An update whose growth has been scored, waiting for the optimiser step."""

    request: Request
    growth: list[GrowthStage]
    # Layers that took no part in the step: they have no gradient to grow by, so they stay as they are.
    without_gradient: frozenset[str]


@dataclass(frozen=True)
class TopologyUpdate:
    """What one topology update has done."""

    index: int  # number of the update, counted from 1
    drop_fraction: float  # share of the active weights that it was to replace, in [0, 1]
    num_new: int  # active weights that were inactive before it
    num_active: int  # active weights of all layers after it
    num_ablated: int = 0  # outputs without an active weight after it (``Strategy.min_salient``)


def request_of(strategy: Strategy, update: DueUpdate, *, num_active: int, num_weights: int) -> Request | None:
    """Return what ``update`` does to a network, or None if it would change nothing.

    Args:
        strategy: the method.
        update: the update that is due.
        num_active: number of active weights of all sparse layers before the update.
        num_weights: number of weights of all sparse layers.

    Raises:
        ConfigError: the drop fraction is outside [0, 1], the density is outside (0, 1], or the
            strategy cannot reach the density.
    """
    drop_fraction, density = update.drop_fraction, update.density
    if not 0 <= drop_fraction <= 1:
        raise ConfigError(f"drop fraction: expected 0 to 1, got {drop_fraction}", do="correct the schedule")
    if density is not None and not 0 < density <= 1:
        raise ConfigError(f"density: expected a number above 0 and at most 1, got {density}", do="correct the schedule")
    target = None if density is None else round(density * num_weights)
    changes_density = target is not None and target != num_active
    rises = target is not None and target > num_active
    if changes_density and strategy.structure != "none":
        raise ConfigError(
            f"density {density}: structure {strategy.structure!r} fixes the density", do="do not change the density"
        )
    if rises and strategy.grow is None:
        present = num_active / num_weights
        raise ConfigError(
            f"density {density} is above the present density {present:g}, but this method grows no weights",
            do="choose a method that grows weights",
        )
    replaces = drop_fraction > 0 and strategy.grow is not None and PRUNE[strategy.prune] is not None
    return Request(drop_fraction, target, rises or replaces) if changes_density or replaces else None
