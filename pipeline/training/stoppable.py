"""Loaders for evaluations, which stop between two batches when the run is asked to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from torch import Tensor

from pipeline.data.loaders import EvalLoader
from pipeline.distributed.session import Session
from pipeline.evaluation.members import MicroBatches
from pipeline.evaluation.predict import EvalBatches

WHAT = "during the evaluation, which starts again when the run is resumed; training is done and saved"


@dataclass(frozen=True)
class StoppableEvalLoader:
    """For the end of a run: batches raise Preempted once ``session`` is asked to stop."""

    loader: EvalBatches
    session: Session

    @property
    def num_samples(self) -> int:
        """Number of samples over all ranks."""
        return self.loader.num_samples

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what ``loader.batches`` does."""
        return self.session.until_asked_to_stop(self.loader.batches(), what=WHAT)


@dataclass(frozen=True)
class StoppableTrainLoader:
    """Wraps ``loader`` so that its micro-batches raise Preempted once ``session`` is asked to stop."""

    loader: MicroBatches
    session: Session

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterator[Tensor]:
        """Yield what ``loader.micro_batches`` does."""
        batches = self.loader.micro_batches(batch=batch, num_batches=num_batches, seed=seed)
        return self.session.until_asked_to_stop(batches, what=WHAT)


class StoppedTogether(Exception):
    """All ranks have ended an evaluation before its end, because one was asked to stop."""


@dataclass(frozen=True)
class AgreedEvalLoader:
    """For an evaluation during training: batches raise StoppedTogether on all ranks once one is asked to stop.

    The ranks agree before each batch, so that they can save a checkpoint together.
    """

    loader: EvalLoader
    session: Session

    @property
    def num_samples(self) -> int:
        """Number of samples over all ranks."""
        return self.loader.num_samples

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield what ``loader.batches`` does."""
        with closing(self.loader.batches()) as batches:  # type: ignore[type-var]
            for _ in range(self.loader.num_batches):
                if self.session.agree_to_stop():
                    raise StoppedTogether
                if (batch := next(batches, None)) is not None:
                    yield batch
