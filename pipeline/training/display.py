"""Show training to a person, on rank 0: one live line on a terminal, elsewhere one log line every N steps."""

from __future__ import annotations

import dataclasses
import logging
import time

from torch import Tensor

from pipeline.plan import Phase, Plan
from pipeline.sparse.request import TopologyUpdate
from pipeline.terminal.live import line
from pipeline.training.divergence import Window, divergence
from pipeline.training.pace import Pace, num_evaluations
from pipeline.training.step_line import Standing, brief, fitting, parts, whole

logger = logging.getLogger(__name__)

WARMUP_POINTS = 1000  # steps of a phase at which the learning rate is looked at, to find the end of the warm-up
MAX_WINDOWS = 3000  # that are kept; more than any rule about divergence needs


class Display:
    """Shows where training stands, how fast it goes and when it ends, and says when it learns nothing.

    Args:
        plan: the plan of the run.
        num_classes: number of classes; 0: unknown, and divergence is not looked for.

    Attributes:
        evaluation_every: steps from one evaluation to the next, for the time left; 0: there are none.
    """

    def __init__(self, plan: Plan, *, num_classes: int) -> None:
        self.evaluation_every = 0
        self._plan, self._num_classes = plan, num_classes
        self._pace = Pace()
        self._last_step_at: float | None = None  # on the clock, less the time of evaluations
        self._standing: Standing | None = None
        self._windows: list[Window] = []
        self._warmup_stop = warmup_stop(plan.phases[0])
        self._is_window_reported = True  # in a log, by a line of its own or beside an evaluation; there is none yet
        self._is_update_reported = False
        self._is_divergence_reported = False
        line.show(lambda _: "waiting for the first batch")

    def step(self, step: int, phase: Phase, loss: Tensor) -> None:
        """Show that run step ``step`` is done. Costs microseconds.

        ``loss`` is that of this rank; until the first window it is read, on a terminal, when the line is drawn.
        """
        now = time.perf_counter()
        if self._last_step_at is not None:  # the first step of a process is slow, and is left out
            self._pace.add_step(now - self._last_step_at)
        self._last_step_at = now
        if line.is_open:
            is_last = step + 1 == self._plan.num_steps
            line.show(
                None if is_last else lambda columns: fitting(parts(self._live(step + 1, phase, loss)), columns - 1)
            )

    def window(
        self,
        step: int,
        phase: Phase,
        *,
        num_steps: int,
        loss: float,
        top1: float,
        r_s: float,
        images_per_second: float,
        data_wait_share: float,
        model_flops: float | None = None,
        peak_gpu_gib: float | None = None,
    ) -> None:
        """Report the window of ``num_steps`` steps that ends with run step ``step``; see `Standing`.

        A log has no line for a window in which the network is evaluated: `beside_evaluation` has its numbers.
        """
        self._standing = dataclasses.replace(
            self._standing or self._at(step + 1, phase),
            loss=loss,
            top1=top1,
            r_s=r_s,
            images_per_second=images_per_second,
            data_wait_share=data_wait_share,
            model_flops=model_flops,
            peak_gpu_gib=peak_gpu_gib,
        )
        self._is_window_reported = not self._num_evaluations(step + 1 - num_steps, step + 1)
        if not line.is_open and self._is_window_reported:
            logger.info("%s", whole(parts(self._at(step + 1, phase))))
        self._windows = [*self._windows[-MAX_WINDOWS:], Window(step + 1 - num_steps, step + 1, loss, top1)]
        if self._num_classes > 1 and not self._is_divergence_reported:
            warning = divergence(
                self._windows,
                num_classes=self._num_classes,
                steps_per_epoch=self._plan.steps_per_epoch,
                batch=self._plan.global_batch,
                warmup_stop=self._warmup_stop,
            )
            self._is_divergence_reported = bool(warning)
            if warning:
                logger.warning("%s", warning)

    def update(self, step: int, phase: Phase, update: TopologyUpdate, *, r_s: float) -> None:
        """Report a topology update after run step ``step``: the first of the process in a log, all others by R_s."""
        if not self._is_update_reported and not line.is_open:
            self._is_update_reported = True
            logger.info(
                "topology update %d after step %d: drop fraction %.3f, %s new weights, R_s %.3f",
                *(update.index, step + 1, update.drop_fraction, f"{update.num_new:,}", r_s),
            )

    def evaluated(self, step: int, phase: Phase, *, val_top1: float, seconds: float) -> None:
        """Take an evaluation after run step ``step`` into account; its result is in the log already."""
        self._pace.add_evaluation(seconds)
        if self._last_step_at is not None:
            self._last_step_at += seconds
        self._standing = dataclasses.replace(self._standing or self._at(step + 1, phase), val_top1=val_top1)

    def beside_evaluation(self, step: int, phase: Phase) -> str:
        """Return what a log says of training beside an evaluation after run step ``step``; empty on a terminal.

        The loss and speed of a window are said once: where it has had its line, the time left stands alone.
        """
        if line.is_open:
            return ""
        at = self._at(step + 1, phase)
        if self._is_window_reported:
            at = dataclasses.replace(at, loss=None, images_per_second=None)
        self._is_window_reported = True
        return brief(at)

    def _at(self, num_done: int, phase: Phase) -> Standing:
        """Return where the run stands after so many steps, with the numbers of the last window."""
        now = {
            "phase": phase.name,
            "step": num_done,
            "lr": phase.lr(num_done - 1),
            "phase_seconds_left": self._seconds_left(num_done, phase.stop),
            "run_seconds_left": self._seconds_left(num_done, self._plan.num_steps),
        }
        if self._standing is None:
            self._standing = Standing(
                phase.name, num_done, self._plan.num_steps, self._plan.steps_per_epoch, phase.lr(num_done - 1)
            )
        return dataclasses.replace(self._standing, **now)  # type: ignore[arg-type]

    def _live(self, num_done: int, phase: Phase, loss: Tensor) -> Standing:
        at = self._at(num_done, phase)
        return at if at.loss is not None else dataclasses.replace(at, loss=float(loss))

    def _seconds_left(self, num_done: int, stop: int) -> float | None:
        return self._pace.seconds_for(stop - num_done, num_evaluations=self._num_evaluations(num_done, stop))

    def _num_evaluations(self, start: int, stop: int) -> int:
        stops = [phase.stop for phase in self._plan.phases]
        return num_evaluations(start, stop, every=self.evaluation_every, phase_stops=stops)


def warmup_stop(phase: Phase) -> int:
    """Return the run step at which the learning rate of a phase is first at its highest."""
    every = 1 + (phase.stop - phase.start) // WARMUP_POINTS
    return max(range(phase.start, phase.stop, every), key=phase.lr)
