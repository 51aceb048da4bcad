"""One log line and one set of metrics every N steps."""

from __future__ import annotations

import logging
import time

from torch import Tensor

from pipeline.data.loaders import TrainLoader
from pipeline.distributed import session
from pipeline.plan import Phase, Plan
from pipeline.sparse.sparsifier import Sparsifier, TopologyUpdate
from pipeline.tracking.tracker import Tracker

logger = logging.getLogger(__name__)


class StepLog:
    """Reports training to the tracker and, on rank 0, to the log. Reads the loss from the device only when it reports."""

    def __init__(self, tracker: Tracker, plan: Plan, loader: TrainLoader, *, every: int) -> None:
        self.tracker = tracker
        self.plan = plan
        self.loader = loader
        self.every = every
        self._since = time.perf_counter()
        self._steps = 0

    def step(
        self, step: int, phase: Phase, loss: Tensor, gradient_norm: Tensor, sparsifier: Sparsifier, update: TopologyUpdate | None
    ) -> None:
        """Report run step ``step`` (its ``loss`` is this rank's) if it is due, and every topology update."""
        self._steps += 1
        if not session.is_main():
            return
        if update is not None:
            mask = {"mask/drop_fraction": update.drop_fraction, "mask/num_new": update.num_new}
            self.tracker.log_metrics(mask | {"mask/density": sparsifier.density, "mask/r_s": sparsifier.r_s}, step=step)
            logger.info(
                "topology update %d after step %d: drop fraction %.3f, %s weights are new, R_s %.3f",
                update.index,
                step + 1,
                update.drop_fraction,
                f"{update.num_new:,}",
                sparsifier.r_s,
            )
        if (step + 1) % self.every and step + 1 != phase.stop:
            return
        seconds = time.perf_counter() - self._since
        images_per_second = self._steps * self.plan.global_batch / seconds
        metrics = {
            "train/loss": float(loss),
            "train/gradient_norm": float(gradient_norm),
            "train/lr": phase.lr(step),
            "train/epoch": (step + 1) / self.plan.steps_per_epoch,
            "time/images_per_second": images_per_second,
            "time/step_seconds": seconds / self._steps,
            "time/data_wait_share": self.loader.seconds_waited / seconds,
        }
        self.tracker.log_metrics(metrics, step=step)
        logger.info(
            "step %d/%d %s  loss %.4f  lr %.4g  R_s %.3f  %.0f images/s, %.0f%% of the time waiting for data",
            step + 1,
            self.plan.num_steps,
            phase.name,
            metrics["train/loss"],
            metrics["train/lr"],
            sparsifier.r_s,
            images_per_second,
            100 * metrics["time/data_wait_share"],
        )
        self.loader.seconds_waited = 0.0
        self._since, self._steps = time.perf_counter(), 0
