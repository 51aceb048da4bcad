"""Report training every N steps: a log line, metrics for the tracker, and slow ranks."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.chain import TICKET
from pipeline.data.loaders import TrainLoader
from pipeline.distributed.session import Session, Stopwatch, device, gather_numbers, is_main
from pipeline.plan import Phase, Plan
from pipeline.sparse.exploration import density_of_layers
from pipeline.sparse.flops import dense_flops
from pipeline.sparse.request import TopologyUpdate
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.tracking.tracker import Tracker
from pipeline.training.chained import is_chained
from pipeline.training.display import Display
from pipeline.training.profiler import ProfileWindow
from pipeline.training.run_chain import RunChain

logger = logging.getLogger(__name__)

STRAGGLER = 1.5  # a rank is slow if its own work per step takes longer than this times the others' median
STRAGGLER_STEPS = 10  # least number of steps over which that is measured, in each of two reports in a row


class StepLog:
    """Reports training to the tracker and, on rank 0, to the log.

    Loss and top-1 are summed on the device and read only for a report, as means over the steps since
    the last one and over all ranks. All ranks take part in a report, and compare the time that each
    spends on its own work, without waiting for the others; slow ranks are reported.

    Args:
        tracker: where metrics go.
        plan: the plan of the run.
        loader: the loader of training images, which measures how long it is waited for.
        session: this rank's session, which measures how long other ranks are waited for.
        every: steps from one report to the next.
        num_classes: number of classes, with which divergence is recognised; 0: unknown.
        chain: gets what is reported, and the digest of the network with every report; None: there is none.
        window: :attr:`window` at the step from which the run is resumed.
        profile: records some steps; None: none.

    Attributes:
        aside: time since the last report that was not spent on training, and is not counted.
        display: shows training to a person; used on rank 0.
    """

    def __init__(
        self,
        tracker: Tracker,
        plan: Plan,
        loader: TrainLoader,
        session: Session,
        *,
        every: int,
        num_classes: int = 0,
        chain: RunChain | None = None,
        window: Tensor | None = None,
        profile: ProfileWindow | None = None,
    ) -> None:
        self.tracker = tracker
        self.plan = plan
        self.loader = loader
        self.session = session
        self.every = every
        self.aside = Stopwatch()
        self.display = Display(plan, num_classes=num_classes)
        self._since = time.perf_counter()
        self._steps = 0  # that are timed: since the last report, by this process
        self.chain = chain
        # Sums of loss and top-1 on this rank, and number of steps, since the last report: float64 [3].
        # Checkpoints have it, so that a run that was resumed reports the same means.
        self.window = torch.zeros(3, dtype=torch.float64, device=device())
        if window is not None:
            self.window += window.to(device())
        self._profile = profile
        self._one = torch.ones((), device=device())  # made once: a step adds no operation for it
        self._slow_before: set[int] = set()  # ranks that were slow in the report before
        self._named: set[int] = set()

    def step(
        self,
        step: int,
        phase: Phase,
        loss: Tensor,
        top1: Tensor,
        gradient_norm: Tensor,
        sparsifier: Sparsifier,
        update: TopologyUpdate | None,
    ) -> None:
        """Report step ``step`` of the run if a report is due, and the topology update if there was one.

        ``loss`` and ``top1`` are those of this rank's batch. Every rank must call this in every step.
        """
        self._steps += 1
        if self._profile is not None:
            self._profile.before(step + 1)
        self.window += torch.stack([loss, top1, self._one])
        if update is not None and is_main():
            mask = {
                "mask/drop_fraction": update.drop_fraction,
                "mask/num_new": update.num_new,
                "mask/turnover": update.num_new / max(1, update.num_active),
                "mask/density": sparsifier.density,
                "mask/r_s": sparsifier.r_s,
            }
            if sparsifier.strategy.min_salient:
                mask["mask/num_ablated"] = update.num_ablated
            self.metrics(mask, step=step)
            layers = density_of_layers(sparsifier.masks), density_of_layers(sparsifier.ever_active)
            self.tracker.log_layers(*layers, step=step)
            if self.chain is not None:
                self.chain.note_layers(step, *layers)
            self.display.update(step, phase, update, r_s=sparsifier.r_s)
        if is_main():
            self.display.step(step, phase, loss)
        if not self.is_due(step):
            return
        seconds = time.perf_counter() - self._since - self.aside.seconds
        work_ms = 1000 * (seconds - self.session.waiting.seconds) / self._steps
        own = torch.tensor([work_ms, take_peak_bytes()], dtype=torch.float64).to(device())
        of_ranks = gather_numbers(torch.cat([own, self.window[:2] / self.window[2], gradient_norm.double().view(1)]))
        if is_main():
            times, peaks, losses, top1s, norms = zip(*of_ranks, strict=True)
            self._name_stragglers(times)
            means = {"loss": statistics.fmean(losses), "top1": statistics.fmean(top1s), "gradient_norm": norms[0]}
            self._report(step, phase, means, sparsifier, seconds=seconds, peak_bytes=max(peaks))
        if self.chain is not None:
            self.chain.report(step + 1, sparsifier)
        self.loader.seconds_waited = self.session.waiting.seconds = self.aside.seconds = 0.0
        self._since, self._steps = time.perf_counter(), 0
        self.window.zero_()

    def is_due(self, step: int) -> bool:
        """Return whether run step ``step`` ends with a report; the same on all ranks."""
        return (step + 1) % self.every == 0 or step + 1 == self.plan.at(step).stop

    def tickets(self, step: int, digests: Mapping[str, str]) -> None:
        """Record in the chain the tickets that were saved after run step ``step``."""
        if self.chain is not None:
            self.chain.add(TICKET, step + 1, tickets=dict(digests))

    def saved(self, *, is_evaluation_left_out: bool) -> dict[str, Any]:
        """Return what a checkpoint saves of the log, as arguments of `Checkpoints.save`."""
        return {
            "tracker_run": self.tracker.run_id,
            "chain": self.chain,
            "window": self.window,
            "is_evaluation_left_out": is_evaluation_left_out,
        }

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        """Report numbers after run step ``step`` to the tracker and the chain; called on rank 0."""
        self.tracker.log_metrics(values, step=step)
        if self.chain is not None:
            self.chain.note(step, {key: value for key, value in values.items() if is_chained(key)})

    def _name_stragglers(self, work_ms: Sequence[float]) -> None:
        if self._steps < STRAGGLER_STEPS:
            return
        slow = set(stragglers(work_ms))
        for rank in sorted(slow & self._slow_before - self._named):  # named once, until it has caught up
            others = statistics.median([*work_ms[:rank], *work_ms[rank + 1 :]])
            logger.warning(
                "rank %d is slow: %.0f ms of its own work per step, median of the others %.0f ms",
                rank,
                work_ms[rank],
                others,
            )
        self._named = slow & (self._named | self._slow_before)
        self._slow_before = slow

    def _report(
        self,
        step: int,
        phase: Phase,
        means: Mapping[str, float],
        sparsifier: Sparsifier,
        *,
        seconds: float,
        peak_bytes: float,
    ) -> None:
        images_per_second = self._steps * self.plan.global_batch / seconds
        metrics = {
            **{f"train/{name}": value for name, value in means.items()},
            "train/lr": phase.lr(step),
            "train/epoch": (step + 1) / self.plan.steps_per_epoch,
            "time/images_per_second": images_per_second,
            "time/step_seconds": seconds / self._steps,
            "time/data_wait_share": self.loader.seconds_waited / seconds,
        }
        if sparsifier.flops is not None:
            # what dense kernels compute: forward, and twice that for the backward pass
            metrics["time/model_flops"] = 3 * dense_flops(sparsifier.flops.macs) * images_per_second
        if peak_bytes:
            metrics["time/peak_gpu_gib"] = peak_bytes / 2**30
        self.metrics(metrics, step=step)
        self.display.window(
            step,
            phase,
            num_steps=self._steps,
            loss=means["loss"],
            top1=means["top1"],
            r_s=sparsifier.r_s,
            images_per_second=images_per_second,
            data_wait_share=metrics["time/data_wait_share"],
            model_flops=metrics.get("time/model_flops") if peak_bytes else None,
            peak_gpu_gib=metrics.get("time/peak_gpu_gib"),
        )


def take_peak_bytes() -> int:
    """Return the largest memory that tensors of this rank had on its GPU since the last call; 0 on a CPU."""
    if device().type != "cuda" or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def stragglers(work_ms: Sequence[float]) -> list[int]:
    """Return the ranks whose work takes more than ``STRAGGLER`` times the median of the other ranks.

    ``work_ms``: one number per rank.
    """
    if len(work_ms) < 2:
        return []
    others = [statistics.median([*work_ms[:rank], *work_ms[rank + 1 :]]) for rank in range(len(work_ms))]
    return [rank for rank, ms in enumerate(work_ms) if ms > STRAGGLER * others[rank]]
