"""Evaluate the network during training, without changing anything that training computes."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config.schema import Config
from pipeline.distributed.session import device, is_main
from pipeline.engine.torch_engine import autocast_dtype
from pipeline.evaluation.predict import Networks
from pipeline.evaluation.score import Score, score
from pipeline.plan import Plan
from pipeline.schedules import length_in_steps
from pipeline.training.step_log import StepLog
from pipeline.training.stoppable import AgreedEvalLoader, StoppedTogether

logger = logging.getLogger(__name__)

NETWORK = "network"  # name of the network as it is trained
NEVER = "never"
State = Mapping[str, Tensor]  # a state_dict


class Evaluation:
    """Evaluates networks on the validation set every ``evaluation.every``.

    Each network has a copy of its own for this, into which its state is loaded. So training keeps its
    weights, BatchNorm statistics and modes without doing anything for it; the state of the
    random-number generators is put back.

    Args:
        config: the configuration.
        plan: the plan of the run.
        loader: this rank's share of the set.
        networks: by name, a network to load the state into, and a function that returns its state.
            Every rank calls the function.
        log: its tracker receives ``val/top1``, ``val/top5`` and ``val/nll`` of the network
            :data:`NETWORK`, and ``val/<name>_top1``, … of others; it leaves out the time of evaluations.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        loader: AgreedEvalLoader,
        networks: Mapping[str, tuple[nn.Module, Callable[[], State]]],
        *,
        log: StepLog,
    ) -> None:
        self.plan = plan
        self.loader = loader
        self.networks = networks
        self.log = log
        self.num_classes = config.model.num_classes
        self.autocast_dtype = autocast_dtype(config.train)
        self.every = steps_between(config, plan)
        log.display.evaluation_every = self.every
        self._phase_ends = {phase.stop for phase in plan.phases}

    def is_due(self, step: int) -> bool:
        """Return whether an evaluation follows run step ``step``; the same on all ranks.

        One is due every ``evaluation.every``, and at the end of each phase.
        """
        return bool(self.every) and ((step + 1) % self.every == 0 or step + 1 in self._phase_ends)

    def run(self, step: int) -> bool:
        """Evaluate after run step ``step``, on all ranks; rank 0 reports.

        Returns:
            False if a rank was asked to stop, which ends the evaluation without a result.
        """
        started = time.perf_counter()
        with self.log.aside, kept_random_state():
            try:
                scores = self._scores()
            except StoppedTogether:
                if is_main():
                    logger.info("the evaluation after step %d was left out: the run was asked to stop", step + 1)
                return False
        if is_main():
            self._report(step, scores, seconds=time.perf_counter() - started)
        return True

    def _scores(self) -> dict[str, Score]:
        for network, state in self.networks.values():
            network.load_state_dict(state())
        networks = Networks([network for network, _ in self.networks.values()], autocast_dtype=self.autocast_dtype)
        return dict(zip(self.networks, score(networks, self.loader, num_classes=self.num_classes), strict=True))

    def _report(self, step: int, scores: Mapping[str, Score], *, seconds: float) -> None:
        values = {"time/evaluation_seconds": seconds}
        phase = self.plan.at(step)
        self.log.display.evaluated(step, phase, val_top1=scores[NETWORK].top1, seconds=seconds)
        beside = self.log.display.beside_evaluation(step, phase)
        epoch, num_epochs = ((steps / self.plan.steps_per_epoch) for steps in (step + 1, self.plan.num_steps))
        for name, found in scores.items():
            prefix, whose = ("", "") if name == NETWORK else (f"{name}_", f", {name}")
            values |= {f"val/{prefix}{key}": getattr(found, key) for key in ("top1", "top5", "nll")}
            logger.info(
                "epoch %.4g of %.4g%s: top-1 %.2f%%%s, NLL %.4f (%.1f s)%s",
                *(epoch, num_epochs, whose, 100 * found.top1),
                # of 5 classes or fewer it is 100%
                f", top-5 {found.top5:.2%}" if self.num_classes > 5 else "",
                *(found.nll, seconds, f"; {beside}" if beside and name == NETWORK else ""),
            )
            if found.num_not_finite:
                logger.warning("the predictions of %d images are not finite (%s)", found.num_not_finite, name)
        self.log.metrics(values, step=step)


def steps_between(config: Config, plan: Plan) -> int:
    """Return ``evaluation.every`` in steps; 0 for ``never``."""
    if config.evaluation.every == NEVER:
        return 0
    return length_in_steps(
        config.evaluation.every,
        steps_per_epoch=plan.steps_per_epoch,
        global_batch=config.train.global_batch,
        reference_batch=config.plan.reference_batch,
    )


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the random-number generators of Python, numpy and torch back after the block, as they were before it."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, others may use it
    devices = [at.index] if (at := device()).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
