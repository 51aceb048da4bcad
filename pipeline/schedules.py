"""Schedules: plain functions of the step, counted from the start of their phase. Resuming restores one integer."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Callable, Sequence

Schedule = Callable[[int], float]
LENGTH = re.compile(r"(\d+(?:\.\d+)?) (steps?|samples?|epochs?)")


def length_in_steps(length: str, *, steps_per_epoch: int, global_batch: int, reference_batch: int) -> int:
    """Convert ``90 epochs``, ``512000 samples`` or ``4000 steps`` (of the reference batch) to steps of this batch."""
    match = LENGTH.fullmatch(length)
    assert match, length  # checked by the caller
    number, unit = float(match[1]), match[2].rstrip("s")
    steps = {
        "epoch": number * steps_per_epoch,
        "sample": number / global_batch,
        "step": number * reference_batch / global_batch,
    }[unit]
    return max(1, round(steps)) if number else 0


def constant(value: float) -> Schedule:
    """Return ``value`` at every step."""
    return lambda step: value


def linear(start: float, end: float, length: int) -> Schedule:
    """Go from ``start`` to ``end`` in a straight line over ``length`` steps, then stay at ``end``."""
    return lambda step: start + (end - start) * min(1.0, step / length)


def cosine(start: float, end: float, length: int) -> Schedule:
    """ITOP's drop fraction: go from ``start`` to ``end`` along half a cosine over ``length`` steps, then stay.

    The value at step t is end + (start − end) · (1 + cos(π · min(1, t / length))) / 2.
    """
    return lambda step: end + (start - end) * (1 + math.cos(math.pi * min(1.0, step / length))) / 2


def rigl_cosine(alpha: float, stop: int) -> Schedule:
    """RigL's drop fraction (arXiv 1911.11134): half a cosine from ``alpha`` down to 0.

    The value at step t is alpha / 2 · (1 + cos(πt / stop)) for t < stop, and 0 from ``stop`` on.

    Args:
        alpha: drop fraction at step 0, for example 0.3.
        stop: the first step without updates, T_end in the paper.

    Example:
        ``rigl_cosine(0.3, stop=100)`` is 0.3 at step 0, 0.15 at step 50, and 0 from step 100 on.
    """
    return lambda step: cosine(alpha, 0.0, stop)(step) if step < stop else 0.0


def stairs(start: float, length: int) -> Schedule:
    """MEST's drop fraction (arXiv 2110.14032): ``start``, half of it from 9/16 of ``length`` on, 0 from 3/4 on.

    Its code changes the mutation ratio of 160 epochs at epochs 90 and 120.
    """
    return lambda step: start if 16 * step < 9 * length else start / 2 if 4 * step < 3 * length else 0.0


def cubic(start: float, end: float, first: int, last: int) -> Schedule:
    """GraNet's density (arXiv 2106.10404): ``start`` until step ``first``, ``end`` from step ``last`` on.

    In between, the value at step t is end + (start − end) · (1 − x)³ with x = (t − first) / (last − first).
    """
    return lambda step: end + (start - end) * (1 - min(1.0, max(0.0, (step - first) / (last - first)))) ** 3


def alternating(dense: float, sparse: float, first: int, last: int, *, interval: int) -> Schedule:
    """AC/DC's density (arXiv 2106.12379): ``dense`` until step ``first``, ``sparse`` from step ``last`` on.

    In between it is ``sparse`` and ``dense`` in turn, for ``interval`` steps each, and ``dense`` for the last two
    of them.

    Example:
        With first = 10, last = 85 and interval = 5 (epochs of ImageNet in the paper) the density is ``sparse`` in
        10–15, 20–25, … 70–75 and from 85 on.
    """

    def at(step: int) -> float:
        if step >= last:
            return sparse
        if step < first or step >= last - 2 * interval:
            return dense
        return dense if (step - first) // interval % 2 else sparse

    return at


def step_decay(value: float, milestones: Sequence[int], factor: float) -> Schedule:
    """Start at ``value`` and multiply by ``factor`` at every milestone (a step)."""
    ordered = sorted(milestones)
    return lambda step: value * factor ** bisect.bisect_right(ordered, step)


def triangular(low: float, high: float, length: int) -> Schedule:
    """Rise in a straight line from ``low`` to ``high`` in the middle of a cycle, and fall back (Sup-tickets).

    The value at step t is low + (high − low) · (1 − |2t / length − 1|).

    Args:
        low: learning rate at the start and the end of the cycle.
        high: learning rate in the middle.
        length: steps of one cycle.

    Example:
        ``triangular(0.001, 0.005, length=100)`` is 0.001 at step 0, 0.003 at step 25, 0.005 at
        step 50 and 0.001 at step 100.
    """
    return lambda step: low + (high - low) * (1 - abs(2 * step / length - 1))


def warmup(schedule: Schedule, num_stairs: float, stair: int) -> Schedule:
    """Scale ``schedule`` up to its full value in stairs, normally of one epoch each.

    On stair e = t // stair the value at step t is schedule(t) · (e + 1) / (num_stairs + 1) while
    e < num_stairs, and schedule(t) from then on.

    Args:
        schedule: the schedule to scale.
        num_stairs: number of stairs below the full value.
        stair: steps per stair.

    Example:
        ``warmup(constant(0.4), num_stairs=3, stair=10)`` is 0.1 at steps 0–9, 0.2 at steps 10–19,
        0.3 at steps 20–29 and 0.4 from step 30 on.
    """

    def at(step: int) -> float:
        index = step // stair
        return schedule(step) * ((index + 1) / (num_stairs + 1) if index < num_stairs else 1.0)

    return at
