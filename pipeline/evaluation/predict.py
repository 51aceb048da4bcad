"""Probabilities of many models in one pass over the data, each image decoded once, gathered from all ranks in sample order."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed.session import is_main, raise_together, world_size
from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.attacks import ATTACKS, Attack
from pipeline.evaluation.batchnorm import autocast, evaluating

logger = logging.getLogger(__name__)

LOG_INTERVAL_SECONDS = 30.0


class EvalBatches(Protocol):
    """What prediction needs of a loader: this rank's share of the samples, each once over all ranks."""

    @property
    def num_samples(self) -> int: ...

    def batches(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Sample ids [images], images [images, channels, height, width], labels [images]."""
        ...


class Networks:
    """Several models that see the same images: ``networks(images)`` is their probabilities, float32 [models, images, classes].

    With ``flip`` they are the mean over each image and its mirror image (test-time augmentation).
    ``names`` are for messages.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        *,
        flip: bool = False,
        autocast_dtype: torch.dtype | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.models = models
        self.names = names or [f"network {i}" for i in range(len(models))]
        self.flip = flip
        self.autocast_dtype = autocast_dtype
        self.device = next(models[0].parameters()).device

    def __call__(self, images: Tensor) -> Tensor:
        probabilities = self._of(images)
        return (probabilities + self._of(images.flip(3))) / 2 if self.flip else probabilities

    def ensemble(self, members: Sequence[int], images: Tensor) -> Tensor:
        """Mean of the probabilities of some of the models: [images, classes]."""
        return Networks([self.models[i] for i in members], flip=self.flip, autocast_dtype=self.autocast_dtype)(
            images
        ).mean(dim=0)

    def _of(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.autocast_dtype):
            return torch.stack([model(images).float() for model in self.models]).softmax(dim=2)


@torch.no_grad()
def predict(
    networks: Networks,
    loader: EvalBatches,
    *,
    num_classes: int,
    attack: Attack | None = None,
    attacked: Sequence[Sequence[int]] = (),
    are_labels_known: bool = True,
) -> tuple[Tensor, Tensor] | None:
    """(probabilities [rows, images, classes] float32, labels [images]) on the CPU of rank 0, None on the other ranks.

    Every rank works its share with all models; the result covers the whole set in order of sample
    id, whatever the number of ranks. The models need not be in evaluation mode and keep the mode
    they have. There is a row for every model and, with ``attack``, one for every one of ``ATTACKS``
    on every ensemble of ``attacked`` (positions of models): what it says of images made to fool it.
    The rows of the first attack come first; images that the attack leaves out have NaN there.
    ``are_labels_known`` is False for a set of other classes, whose labels are not looked at.

    Raises DataError when a label is out of range or a sample is missing or there twice,
    NumericsError, on every rank, when a network's predictions are not finite.
    """
    attacks = [(name, members) for name in ATTACKS for members in attacked] if attack is not None else []
    ids, labels = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    probabilities = [
        torch.empty(len(networks.models) + len(attacks), 0, num_classes)
    ]  # a rank may have no batch at all
    num_done, log_at = 0, time.monotonic() + LOG_INTERVAL_SECONDS
    are_finite = torch.ones(len(networks.models), dtype=torch.bool, device=networks.device)
    with evaluating(*networks.models):
        for batch_ids, images, batch_labels in loader.batches():
            images = images.to(networks.device, non_blocking=True)
            rows = [networks(images)]
            are_finite &= rows[0].isfinite().all(dim=2).all(dim=1)
            if attack is not None and attacks:
                chosen = attack.chosen(batch_ids, loader.num_samples)
                rows.append(rows[0].new_full((len(attacks), *rows[0].shape[1:]), torch.nan))
                given = images[chosen], batch_labels[chosen].to(networks.device), batch_ids[chosen]
                for row, (name, members) in zip(rows[1], attacks if len(given[0]) else [], strict=False):
                    of_members = partial(networks.ensemble, members)
                    row[chosen] = of_members(attack(name, of_members, *given))
            probabilities.append(torch.cat(rows).cpu())
            ids.append(batch_ids.to("cpu", torch.long, copy=True))  # a loader may fill the same memory again
            labels.append(batch_labels.to("cpu", torch.long, copy=True))
            num_done += len(batch_ids)
            if is_main() and time.monotonic() >= log_at:
                log_at = time.monotonic() + LOG_INTERVAL_SECONDS
                logger.info("evaluated %d of %d images of this rank", num_done, -(-loader.num_samples // world_size()))
    raise_together(_not_finite(networks.names, are_finite.tolist()))
    share = (torch.cat(ids), torch.cat(labels), torch.cat(probabilities, dim=1))
    whole = share if world_size() == 1 else _gather(*share, device=networks.device)
    return (
        None
        if whole is None
        else _in_sample_order(*whole, num_samples=loader.num_samples, are_labels_known=are_labels_known)
    )


def _not_finite(names: Sequence[str], are_finite: Sequence[bool]) -> NumericsError | None:
    """The error where a network predicts NaN: no class would be the largest, and the first would count as predicted."""
    bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
    if not bad:
        return None
    return NumericsError(
        f"predictions of {', '.join(bad)} are not finite", do="leave it out, or evaluate with train.precision=fp32"
    )


def _gather(
    ids: Tensor, labels: Tensor, probabilities: Tensor, *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The shares of all ranks one after the other, on rank 0.

    One model's share travels at a time, to bound the memory of a GPU.
    """
    here = torch.tensor([len(ids)], device=device)
    counts = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(counts, here)
    if not is_main():
        for part in (ids, labels, *probabilities):
            dist.send(part.contiguous().to(device), dst=0)
        return None
    all_ids, all_labels = [ids], [labels]
    all_probabilities = probabilities.new_empty(
        len(probabilities), sum(int(count) for count in counts), probabilities.shape[2]
    )
    all_probabilities[:, : len(ids)] = probabilities
    first = len(ids)
    for source, count in enumerate(int(count) for count in counts):
        if source == 0:
            continue
        all_ids.append(_receive(ids.new_empty(count), source, device))
        all_labels.append(_receive(labels.new_empty(count), source, device))
        for of_model in all_probabilities[:, first : first + count]:
            of_model.copy_(_receive(torch.empty_like(of_model), source, device))
        first += count
    return torch.cat(all_ids), torch.cat(all_labels), all_probabilities


def _receive(like: Tensor, source: int, device: torch.device) -> Tensor:
    part = like.to(device)
    dist.recv(part, src=source)
    return part.cpu()


def _in_sample_order(
    ids: Tensor, labels: Tensor, probabilities: Tensor, *, num_samples: int, are_labels_known: bool
) -> tuple[Tensor, Tensor]:
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(num_samples)):
        raise DataError(
            f"of {num_samples} samples {len(set(ids.tolist()))} were evaluated, in {len(ids)} predictions: each must come exactly once"
        )
    labels = labels[order]
    num_classes = probabilities.shape[2]
    if are_labels_known and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(f"labels from {int(labels.min())} to {int(labels.max())} do not fit {num_classes} classes")
    return probabilities[:, order], labels
