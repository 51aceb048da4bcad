"""One rank of ``benchmarks.checks``.

``python -m benchmarks.support.checks_worker TASK.json OUTPUT.json``, with ``RANK`` etc. set.
"""

from __future__ import annotations

import json
import queue
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.support.workload import DENSITY
from pipeline import models
from pipeline.checkpoint.checkpoints import Checkpoints
from pipeline.command_line import leave
from pipeline.config.load import load_config
from pipeline.data.ffcv_source import Epoch
from pipeline.distributed import group, session
from pipeline.engine.build import build_engine
from pipeline.plan import build_plan
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS
from pipeline.tracking import open_tracker
from pipeline.training.step_log import StepLog

NO_NORM = torch.zeros(())


class Loop:
    """The loop of launchers/train.py; every rank has its own images."""

    def __init__(self, model: str, *, side: int, num_images: int, folder: Path) -> None:
        overrides = [
            "data.train=t",
            "data.val=v",
            "train.engine=torch",
            "train.precision=fp32",
            "tracking.backend=jsonl",
        ]
        config = load_config("imagenet_r50_s90", overrides)
        assert config.data.train_samples is not None
        self.steps_per_epoch = config.data.train_samples // config.train.global_batch
        plan = build_plan(config, steps_per_epoch=self.steps_per_epoch)
        self.phase = plan.at(0)
        self.check_every, self.log_every = config.sparsity.check_every, config.tracking.log_every_steps
        self.session = session.Session()
        self.engine = engine = build_engine(models.build(model), config.train, waiting=self.session.waiting)
        self.sparsifier = Sparsifier(
            engine.model,
            engine.optimizer,
            METHODS["rigl"],
            density=DENSITY,
            seed=0,
            fragments=engine.fragments,
            on_masks=engine.use_masks,
        )
        generator = torch.Generator().manual_seed(session.rank())
        self.images = torch.randn(num_images, 3, side, side, generator=generator)
        self.labels = torch.randint(0, 1000, (num_images,), generator=generator)
        self.tracker = open_tracker(config.tracking, output_dir=folder, run_name="checks")
        loader: Any = SimpleNamespace(seconds_waited=0.0)
        self.log = StepLog(self.tracker, plan, loader, self.session, every=self.log_every)
        self.checkpoints = Checkpoints(folder / "checkpoints", config, plan, data_digest="")
        self.decoded: queue.Queue[Any] = queue.Queue()
        self.epoch: Any = SimpleNamespace(
            output_queue=self.decoded, damaged=np.full(1, -1), timeout_seconds=config.data.batch_timeout_seconds
        )

    def step(self, *, is_checked: bool, is_mask_checked: bool) -> None:
        """Take one training step, with or without the checks."""
        images, labels = Epoch.receive(self.epoch) if is_checked else self.decoded.get()[1]
        loss, top1, gradient_norm = self.engine.backward(images, labels, lr=1e-3, dense=False)
        if is_checked:
            self.session.agree_to_go_on(loss, gradient_norm, 0)
        self.sparsifier.before_step(is_finite=True, is_masked=self.engine.masks_gradients)
        self.engine.step()
        self.sparsifier.check_every = 1 if is_mask_checked else 0
        self.sparsifier.after_step()
        if is_checked:
            self.log.step(0, self.phase, loss, top1, gradient_norm, self.sparsifier, None)

    def milliseconds_of_step(self, *, is_checked: bool, is_mask_checked: bool) -> float:
        self.decoded.put((0, (self.images, self.labels)))
        if is_checked:
            return milliseconds(lambda: self.step(is_checked=True, is_mask_checked=is_mask_checked))
        with patch("pipeline.engine.reduction._norm_of", lambda tensors: NO_NORM):
            return milliseconds(lambda: self.step(is_checked=False, is_mask_checked=False))

    def round(self) -> tuple[float, float]:
        """Time the steps between two checks of the masks, alternately with and without all checks.

        Returns:
            Milliseconds with and without.
        """
        sums = {True: 0.0, False: 0.0}
        for index in range(self.check_every):
            for is_checked in (True, False) if index % 2 else (False, True):
                sums[is_checked] += self.milliseconds_of_step(
                    is_checked=is_checked, is_mask_checked=index == self.check_every - 1
                )
        return sums[True], sums[False]

    def report(self) -> None:
        one = torch.ones(())
        self.log.step(self.log_every - 1, self.phase, one, one, one, self.sparsifier, None)

    def save(self) -> None:
        """Save a checkpoint until it is on disk: its thread takes time from the only core."""
        self.checkpoints.save(1, self.engine, self.sparsifier, tracker_run="")
        self.checkpoints.finish()


def milliseconds(leg: Callable[[], object]) -> float:
    """Return the wall time of ``leg`` on this rank; all ranks start together."""
    session.barrier()
    started = time.perf_counter()
    leg()
    return 1000 * (time.perf_counter() - started)


def median_ms(leg: Callable[[], object], *, rounds: int) -> float:
    leg()
    return statistics.median(milliseconds(leg) for _ in range(rounds))


def measure(*, model: str, side: int, num_images: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="checks-") as name:
        loop = Loop(model, side=side, num_images=num_images, folder=Path(session.broadcast_text(name)))
        with loop.tracker, loop.checkpoints:
            loop.round()
            return {
                "rounds": [loop.round() for _ in range(rounds)],
                "check_ms": median_ms(loop.sparsifier.check, rounds=3 * rounds),
                "check_every": loop.check_every,
                "report_ms": median_ms(loop.report, rounds=3 * rounds),
                "report_every": loop.log_every,
                "save_ms": median_ms(loop.save, rounds=rounds),
                "save_every": loop.steps_per_epoch,
            }


def main() -> None:
    task = json.loads(sys.argv[1])
    with group.join(threads_per_rank=task.pop("threads")):
        result = measure(**task)
        session.barrier()  # rank 0's folder is used until here
        if session.is_main():
            Path(sys.argv[2]).write_text(json.dumps(result))
    leave(0)


if __name__ == "__main__":
    main()
