"""Accuracy and NLL of several networks over a set: sums over all ranks, without gathering predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.distributed.session import is_main, world_size
from pipeline.errors import DataError
from pipeline.evaluation import metrics
from pipeline.evaluation.batchnorm import evaluating
from pipeline.evaluation.predict import EvalBatches, Networks
from pipeline.terminal.progress import show_progress


@dataclass(frozen=True)
class Score:
    """How well one network predicts a set; the metrics are those of the report (:mod:`pipeline.evaluation.metrics`)."""

    top1: float  # fraction of images; an image whose predictions are not finite is not right
    top5: float  # fraction of images, the same
    nll: float  # nats, mean over images
    num_not_finite: int  # number of images whose predictions are not finite


@torch.no_grad()
def score(networks: Networks, loader: EvalBatches, *, num_classes: int) -> list[Score]:
    """Return the score of each network over the whole set, the same on every rank.

    Counts are exact, and sums are taken in float64. Every rank must call this.

    Args:
        networks: the models; they are evaluated in evaluation mode, and keep the mode they had.
        loader: this rank's share of the set.
        num_classes: number of classes that the models predict.

    Raises:
        DataError: on every rank, when a label is out of range, or images are missing.
    """
    sums = torch.zeros(len(networks.models), 4, dtype=torch.float64, device=networks.device)  # of `_values`
    counts = torch.zeros(2, dtype=torch.float64, device=networks.device)  # images, labels that are out of range
    with evaluating(*networks.models), show_progress("evaluating", "images", says_end=False) as report:
        for num_batches, (_, images, labels) in enumerate(loader.batches()):
            if is_main():
                report(num_batches * len(images), -(-loader.num_samples // world_size()))  # of this rank, as the others
            images, labels = (part.to(networks.device, non_blocking=True) for part in (images, labels))
            known = labels.clamp(0, num_classes - 1)
            counts += torch.stack([torch.ones_like(known), labels != known]).sum(dim=1)
            sums += torch.stack([_values(of_network, known) for of_network in networks(images)])
    everything = torch.cat([counts, sums.flatten()])
    if world_size() > 1:
        dist.all_reduce(everything)
    num_images, num_out_of_range, *totals = everything.tolist()  # the only host read
    if num_images != loader.num_samples or num_out_of_range:
        raise DataError(
            f"expected {loader.num_samples} images with labels from 0 to {num_classes - 1} in an evaluation, got "
            f"{num_images:.0f} images, {num_out_of_range:.0f} of them with other labels",
            is_reported_elsewhere=not is_main(),
        )
    return [
        Score(top1 / num_images, top5 / num_images, nll / num_images, int(num_not_finite))
        for top1, top5, nll, num_not_finite in zip(*[iter(totals)] * 4, strict=True)
    ]


def _values(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over images of the fields of :class:`Score`, float64 [4]."""
    are_finite = probabilities.isfinite().all(dim=1)
    values = (
        (metrics.predicted_classes(probabilities) == labels) & are_finite,
        metrics.is_top5(probabilities, labels) & are_finite,
        metrics.nll_of_images(probabilities, labels),
        ~are_finite,
    )
    return torch.stack([each.sum(dtype=torch.float64) for each in values])
