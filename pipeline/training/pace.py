"""How fast a run goes, and how long it will take."""

from __future__ import annotations

from collections.abc import Sequence

NUM_STEPS = 500  # over about so many steps the time of a step is averaged
NUM_EVALUATIONS = 5


class Pace:
    """The smoothed time of a step, and that of an evaluation, which is not a part of it."""

    def __init__(self) -> None:
        self._steps = self._seconds = 0.0
        self._evaluations: list[float] = []

    def add_step(self, seconds: float) -> None:
        """Take a step of so many seconds into account."""
        kept = 1 - 1 / NUM_STEPS
        self._steps, self._seconds = self._steps * kept + 1, self._seconds * kept + seconds

    def add_evaluation(self, seconds: float) -> None:
        """Take an evaluation of so many seconds into account."""
        self._evaluations = [*self._evaluations, seconds][-NUM_EVALUATIONS:]

    def seconds_for(self, num_steps: int, *, num_evaluations: int = 0) -> float | None:
        """Return how long so many steps and evaluations will take; None before the first step."""
        if not self._steps:
            return None
        evaluation = sum(self._evaluations) / len(self._evaluations) if self._evaluations else 0.0
        return num_steps * self._seconds / self._steps + num_evaluations * evaluation


def num_evaluations(start: int, stop: int, *, every: int, phase_stops: Sequence[int]) -> int:
    """Count the evaluations after steps ``start`` … ``stop`` − 1 of a run.

    Args:
        start: first step.
        stop: the step after the last.
        every: steps from one evaluation to the next; 0: none at all.
        phase_stops: numbers of steps after which a phase ends, with an evaluation.
    """
    if not every:
        return 0
    return stop // every - start // every + sum(start < end <= stop and end % every != 0 for end in phase_stops)
