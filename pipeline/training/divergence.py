"""Distinguish a run that learns nothing from one that learns, by the loss and top-1 of its windows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_WINDOWS = 5  # least number of windows that all must look wrong
LOSS_FACTOR = 1.5  # a loss is far above its start beyond this multiple of the loss of guessing
LOSS_STEPS = 100  # least number of steps with such losses
CHANCE_EPOCHS, CHANCE_STEPS = 3, (200, 2000)  # accuracy is judged over so many epochs; least and most steps for that
CHANCE_MARGIN = 0.1, 0.01  # relative and absolute: the class that is always predicted may be a little larger
SIGMAS = 3.0  # standard deviations of guessing

LOOK_AT = "look at the labels, at data.mean and data.std, and at the learning rate"


@dataclass(frozen=True)
class Window:
    """Means over the steps from one report to the next, over all ranks."""

    start: int  # first step
    stop: int  # the step after the last
    loss: float
    top1: float  # fraction


def divergence(
    windows: Sequence[Window], *, num_classes: int, steps_per_epoch: int, batch: int, warmup_stop: int
) -> str:
    """Return what is wrong with the newest windows of a run; empty if nothing is.

    Two rules, each over the last ``NUM_WINDOWS`` windows and as many more as its least length takes:

    * Every loss is above ``LOSS_FACTOR`` times ln(classes), the loss of guessing, which is about that of
      the start, with label smoothing too. Least length: ``LOSS_STEPS``.
    * After the warm-up, top-1 over all images of these windows is at most 1/classes, with the smaller
      margin of ``CHANCE_MARGIN`` and ``SIGMAS`` standard deviations of guessing. Least length:
      ``CHANCE_EPOCHS``, within the bounds ``CHANCE_STEPS``.

    Args:
        windows: the windows of the run, oldest first.
        num_classes: number of classes.
        steps_per_epoch: number of steps of an epoch.
        batch: images of a step, over all ranks.
        warmup_stop: the step after the warm-up of the learning rate.
    """
    guessing, chance = math.log(num_classes), 1 / num_classes
    newest = _newest(windows, LOSS_STEPS)
    if newest and all(window.loss > LOSS_FACTOR * guessing for window in newest):
        return (
            f"the loss has been above {LOSS_FACTOR * guessing:.3g} for {_span(newest)} steps, and is "
            f"{newest[-1].loss:.3g} now (guessing has {guessing:.3g}): training has diverged; {LOOK_AT}"
        )
    least, most = CHANCE_STEPS
    newest = _newest(
        [window for window in windows if window.start >= warmup_stop],
        max(least, min(most, CHANCE_EPOCHS * steps_per_epoch)),
    )
    if newest:
        steps = _span(newest)
        top1 = sum(window.top1 * (window.stop - window.start) for window in newest) / steps
        deviation = math.sqrt(chance * (1 - chance) / (steps * batch))
        relative, absolute = CHANCE_MARGIN
        if top1 <= chance + min(relative * chance, absolute) + SIGMAS * deviation:
            return (
                f"top-1 on training images is {top1:.2%} over the last {steps} steps, as by guessing one of "
                f"{num_classes} classes: nothing is learnt; {LOOK_AT}"
            )
    return ""


def _span(windows: Sequence[Window]) -> int:
    return windows[-1].stop - windows[0].start


def _newest(windows: Sequence[Window], num_steps: int) -> Sequence[Window]:
    """Return the newest windows that span ``num_steps``, at least ``NUM_WINDOWS``; none if there are not so many."""
    for kept in range(NUM_WINDOWS, len(windows) + 1):
        if windows[-1].stop - windows[-kept].start >= num_steps:
            return windows[-kept:]
    return []
