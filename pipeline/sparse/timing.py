"""When a method updates the topology, how many weights each update replaces, and the density after it.

Everything is a function of the step and of a :class:`Strategy`. A training loop of your own calls
:func:`timetable`; the phases of ``pipeline.plan`` use the same :class:`UpdateSchedule`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from pipeline import schedules
from pipeline.errors import ConfigError
from pipeline.schedules import LENGTH, Schedule, length_in_steps
from pipeline.sparse.strategy import Strategy, find_strategy


@dataclass(frozen=True)
class DueUpdate:
    """What a topology update must do."""

    drop_fraction: float = 0.0  # share of the active weights to replace, in [0, 1]
    density: float | None = None  # share of all sparse weights that are active afterwards, in (0, 1]; None: unchanged


@dataclass(frozen=True)
class UpdateSchedule:
    """The topology updates of a run or phase of ``num_steps`` optimiser steps, counted from 0."""

    num_steps: int
    update_interval: int | None  # steps between updates; None: only the opening update, if there is one
    drop_schedule: Schedule  # drop fraction as a function of the number of completed steps
    opening_drop: float | None = None  # drop fraction of an update after the first step; None: no such update
    density_schedule: Schedule | None = None  # density as a function of the completed steps; None: it never changes
    density_until: int = 0  # number of completed steps after which the density is final

    def at(self, step: int) -> DueUpdate | None:
        """Return the topology update that follows ``step`` (counted from 0), or None if none is due.

        An update follows every ``update_interval`` completed steps, but never the last step. The
        opening update follows the first step, because growth needs a gradient. The first update at
        or after the end of the density schedule sets the final density.
        """
        completed = step + 1
        if completed == self.num_steps:
            return None
        is_due = self.update_interval is not None and completed % self.update_interval == 0
        density = self._density(completed) if is_due else None
        if self.opening_drop is not None and completed == 1:
            return DueUpdate(self.opening_drop, density)
        drop_fraction = self.drop_schedule(completed) if is_due else 0.0
        if not drop_fraction and (density is None or density == self._density_before(completed)):
            return None
        return DueUpdate(drop_fraction, density)

    def steps(self) -> list[int]:
        """Return the steps that are followed by a topology update, counted from 0, in ascending order."""
        interval = self.update_interval
        due = range(interval - 1, self.num_steps, interval) if interval else ()
        return [step for step in sorted({0, *due}) if self.at(step) is not None]

    def _density(self, completed: int) -> float | None:
        if self.density_schedule is None or self.update_interval is None:
            return None
        return self.density_schedule(completed) if completed < self.density_until + self.update_interval else None

    def _density_before(self, completed: int) -> float | None:
        """Return the density that the update before set, or the initial one."""
        assert self.density_schedule is not None and self.update_interval is not None
        return self.density_schedule(completed - self.update_interval)


def timetable(
    method: str | Strategy, num_steps: int, *, steps_per_epoch: int | None = None, density: float | None = None
) -> UpdateSchedule:
    """Return the update schedule of ``method``, as in its paper, for a run of ``num_steps`` optimiser steps.

    For example, RigL (arXiv 1911.11134) updates every 100 steps. Each update replaces the fraction
    α/2·(1 + cos(πt/T_end)) of the active weights, with α = 0.3 and T_end = 0.75·``num_steps``::

        >>> updates = timetable("rigl", 1000)
        >>> updates.steps()
        [99, 199, 299, 399, 499, 599, 699]
        >>> updates.at(374), round(updates.at(299).drop_fraction, 3)
        (None, 0.196)

    To change the interval or the drop fraction, pass a changed strategy from
    :func:`pipeline.sparse.method`: ``timetable(method("rigl", update_interval="50 steps"), 1000)``.

    Args:
        method: a name in ``METHODS``, or a Strategy.
        num_steps: number of optimiser steps of the run.
        steps_per_epoch: optimiser steps per epoch; required by methods whose lengths are in epochs
            (``set``, ``snfs``, ``granet``, ``gmp``, ``acdc``).
        density: final density, in (0, 1]; required by methods whose density changes (``granet``, ``gmp``, ``acdc``).

    Raises:
        ConfigError: the name is unknown; a length is invalid, or is in epochs without
            ``steps_per_epoch``; or the density schedule does not end within ``num_steps``.
    """
    strategy = find_strategy(method)
    if strategy.initial_density is not None and density is None:
        raise ConfigError(
            f"density: this method starts at density {strategy.initial_density:g} and needs the final density",
            do="pass density=… to timetable",
        )

    def in_steps(length: str) -> int:
        match = LENGTH.fullmatch(length)
        if not match or match[2].startswith("sample"):
            raise ConfigError(
                f"expected a number of steps or epochs, got {length!r}", do="write '100 steps' or '1 epochs'"
            )
        if match[2].startswith("epoch") and steps_per_epoch is None:
            raise ConfigError(
                f"steps_per_epoch: is required, because this method has a length of {length!r}",
                do="pass steps_per_epoch=len(loader) to timetable",
            )
        return length_in_steps(length, steps_per_epoch=steps_per_epoch or 0, global_batch=1, reference_batch=1)

    return build_update_schedule(strategy, num_steps, in_steps=in_steps, density=density)


def build_update_schedule(
    strategy: Strategy,
    num_steps: int,
    *,
    in_steps: Callable[[str], int],
    density: float | None = None,
    opening_drop: float | None = None,
) -> UpdateSchedule:
    """Return the update schedule of ``strategy`` for ``num_steps`` optimiser steps.

    Args:
        strategy: the method.
        num_steps: number of optimiser steps of the run or phase.
        in_steps: converts a length such as ``1 epochs`` to optimiser steps.
        density: final density, in (0, 1]; None: the density does not change.
        opening_drop: drop fraction of an update after the first step, in [0, 1]; None: no such update.

    Raises:
        ConfigError: no update comes at or after the end of the density schedule.
    """
    interval = strategy.update_interval if strategy.changes_masks else None
    constant = UpdateSchedule(
        num_steps=num_steps,
        update_interval=in_steps(interval) if interval else None,
        drop_schedule=drop_schedule(strategy, num_steps),
        opening_drop=opening_drop,
    )
    if strategy.initial_density is None or density is None:
        return constant
    first, last = in_steps(strategy.density_from), in_steps(strategy.density_until)
    if first < last:
        schedule = density_schedule(strategy, density, first, last, interval=constant.update_interval)
        changing = dataclasses.replace(constant, density_schedule=schedule, density_until=last)
        if any(step + 1 >= last for step in changing.steps()):
            return changing
    raise ConfigError(
        f"density_until: no update follows {strategy.density_until} (step {last} of {num_steps}), so the density would "
        f"not reach {density:g}",
        do="end the density schedule earlier, or update more often",
    )


def density_schedule(strategy: Strategy, density: float, first: int, last: int, *, interval: int | None) -> Schedule:
    """Return the density of ``strategy`` as a function of the number of completed steps, from ``first`` to ``last``."""
    start = strategy.initial_density
    assert start is not None
    return {
        "cubic": lambda: schedules.cubic(start, density, first, last),
        "alternating": lambda: schedules.alternating(start, density, first, last, interval=interval or last),
    }[strategy.density_schedule]()


def drop_schedule(strategy: Strategy, num_steps: int) -> Schedule:
    """Return the drop fraction of ``strategy`` as a function of the number of completed steps."""
    start, end = strategy.drop_fraction, strategy.drop_end
    return {
        "constant": lambda: schedules.constant(start),
        "linear": lambda: schedules.linear(start, end, num_steps),
        "cosine": lambda: schedules.cosine(start, end, num_steps),
        "stairs": lambda: schedules.stairs(start, num_steps),
        "rigl_cosine": lambda: schedules.rigl_cosine(start, round(0.75 * num_steps)),
    }[strategy.drop_schedule]()
