"""Schedules are plain functions of the step, counted from the start of their phase. Resuming restores one integer."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]


def constant(value: float) -> Schedule:
    """``value`` at every step."""
    return lambda step: value


def linear(start: float, end: float, length: int) -> Schedule:
    """From ``start`` to ``end`` over ``length`` steps, then ``end``."""
    return lambda step: start + (end - start) * min(1.0, step / length)


def cosine(start: float, end: float, length: int) -> Schedule:
    """Half a cosine from ``start`` to ``end`` over ``length`` steps, then ``end``: it never rises again (ITOP's drop fraction)."""
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / length))) / 2


def rigl_cosine(alpha: float, stop: int) -> Schedule:
    """RigL's drop fraction α/2·(1 + cos(πt/T_end)), 0 from ``stop`` = T_end on."""
    return lambda step: cosine(alpha, 0.0, stop)(step) if step < stop else 0.0


def cubic(start: float, end: float, first: int, last: int) -> Schedule:
    """GraNet's density: ``start`` until ``first``, ``end`` from ``last`` on, D_f + (D_i − D_f)(1 − x)³ between (arXiv 2106.10404)."""
    return lambda step: end + (start - end) * (1 - min(1.0, max(0.0, (step - first) / (last - first)))) ** 3


def step_decay(value: float, milestones: Sequence[int], factor: float) -> Schedule:
    """``value`` times ``factor`` for every milestone reached."""
    ordered = sorted(milestones)
    return lambda step: value * factor ** bisect.bisect_right(ordered, step)


def triangular(low: float, high: float, length: int) -> Schedule:
    """Linear from ``low`` to ``high`` at the middle of the cycle of ``length`` steps and back (Sup-tickets' cyclic phases)."""
    return lambda step: low + (high - low) * (1 - abs(2 * step / length - 1))


def warmup(schedule: Schedule, num_stairs: float, stair: int) -> Schedule:
    """``schedule``, scaled by (e + 1)/(num_stairs + 1) on stair e = 0, 1, … of ``stair`` steps (epochs) below ``num_stairs``."""

    def at(step: int) -> float:
        index = step // stair
        return schedule(step) * ((index + 1) / (num_stairs + 1) if index < num_stairs else 1.0)

    return at
