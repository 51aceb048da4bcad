"""Predict with many models in one pass over the data, and gather the probabilities of all ranks.

Each image is decoded once for all models. The result is in sample order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.distributed.session import device, is_main, raise_together, world_size
from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.attacks import ATTACKS, Attack
from pipeline.evaluation.batchnorm import autocast, evaluating
from pipeline.terminal.progress import show_progress


class EvalBatches(Protocol):
    """The part of a loader that prediction needs: this rank's share of a set."""

    @property
    def num_samples(self) -> int:
        """Number of samples over all ranks; each sample belongs to one rank."""
        ...

    def batches(self) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Yield sample ids [images], images [images, channels, height, width] and labels [images]."""
        ...


class Networks:
    """Several models that predict the same images.

    ``networks(images)`` returns their probabilities, float32 [models, images, classes].

    Args:
        models: the models, all on one device.
        flip: average the probabilities of each image and its mirror image (test-time augmentation).
        autocast_dtype: the type that the forward pass is autocast to; None: no autocast.
        names: names of the models in error messages.
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
        of_parameters = (parameter.device for model in models for parameter in model.parameters())
        self.device = next(of_parameters, None) or device()

    def __call__(self, images: Tensor) -> Tensor:
        """Return probabilities, float32 [models, images, classes]."""
        probabilities = self._of(images)
        return (probabilities + self._of(images.flip(3))) / 2 if self.flip else probabilities

    def ensemble(self, members: Sequence[int], images: Tensor) -> Tensor:
        """Return the mean probabilities of the models at positions ``members``: [images, classes]."""
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
    """Predict a whole set on all ranks, each rank with all models on its share.

    Models are evaluated in evaluation mode, and keep the mode they had. Every rank must call this.

    Args:
        networks: the models.
        loader: this rank's share of the set.
        num_classes: number of classes that the models predict.
        attack: also predict adversarial images, made against each ensemble in ``attacked``.
        attacked: ensembles, each given by the positions of its models.
        are_labels_known: False for a set of other classes, whose labels are ignored.

    Returns:
        On rank 0 probabilities and labels on the CPU, in order of sample id; None on other ranks.
        Probabilities are float32 [rows, images, classes]. There is a row for each model, followed by
        a row for each pair of an attack of ``ATTACKS`` and an ensemble of ``attacked``: first all of
        the first attack. Images that are not attacked are NaN in these rows. Labels are [images].

    Raises:
        DataError: a label is out of range, or a sample is missing or occurs twice.
        NumericsError: on every rank, when a model's predictions are not finite.
    """
    attacks = [(name, members) for name in ATTACKS for members in attacked] if attack is not None else []
    ids, labels = [torch.empty(0, dtype=torch.long)], [torch.empty(0, dtype=torch.long)]
    # the empty parts are for a rank without a batch
    probabilities = [torch.empty(len(networks.models) + len(attacks), 0, num_classes)]
    num_done = 0
    are_finite = torch.ones(len(networks.models), dtype=torch.bool, device=networks.device)
    with evaluating(*networks.models), show_progress("evaluating", "images", says_end=False) as report:
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
            ids.append(batch_ids.to("cpu", torch.long, copy=True))  # because a loader may reuse the memory
            labels.append(batch_labels.to("cpu", torch.long, copy=True))
            num_done += len(batch_ids)
            if is_main():
                report(num_done, -(-loader.num_samples // world_size()))  # of this rank, as the others
    raise_together(_not_finite(networks.names, are_finite.tolist()))
    share = (torch.cat(ids), torch.cat(labels), torch.cat(probabilities, dim=1))
    whole = share if world_size() == 1 else _gather(*share, device=networks.device)
    return (
        None
        if whole is None
        else _in_sample_order(*whole, num_samples=loader.num_samples, are_labels_known=are_labels_known)
    )


def _not_finite(names: Sequence[str], are_finite: Sequence[bool]) -> NumericsError | None:
    """Return an error if a network's predictions are not finite.

    With NaN no class has the largest probability, and class 0 would count as predicted.
    """
    bad = [name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite]
    if not bad:
        return None
    return NumericsError(
        f"predictions of {', '.join(bad)} are not finite",
        do="evaluate with train.precision=fp32, or leave out these networks",
    )


def _gather(
    ids: Tensor, labels: Tensor, probabilities: Tensor, *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Concatenate the shares of all ranks on rank 0; returns None on the other ranks.

    The probabilities of one model are gathered at a time, to bound GPU memory. (Sends from every rank
    to rank 0 would make NCCL open a communicator for each pair of ranks.)
    """
    here = torch.tensor([len(ids)], device=device)
    everywhere = [torch.empty_like(here) for _ in range(world_size())]
    dist.all_gather(everywhere, here)
    counts: list[int] = torch.cat(everywhere).tolist()
    gathered = [_on_main(part, counts, device) for part in (ids, labels)]
    of_models = [_on_main(part, counts, device) for part in probabilities]
    if not is_main():
        return None
    return gathered[0], gathered[1], torch.stack(of_models)


def _on_main(part: Tensor, counts: Sequence[int], device: torch.device) -> Tensor:
    """Gather ``counts[rank]`` rows of each rank, in order of rank, on the CPU of rank 0; empty on other ranks.

    One collective, for which shorter parts are padded.
    """
    here = torch.zeros((max(counts), *part.shape[1:]), dtype=part.dtype, device=device)
    here[: len(part)].copy_(part)
    everywhere = [torch.empty_like(here) for _ in counts] if is_main() else None
    dist.gather(here, everywhere, dst=0)
    if everywhere is None:
        return part[:0]
    return torch.cat([rows[:count].cpu() for rows, count in zip(everywhere, counts, strict=True)])


def _in_sample_order(
    ids: Tensor, labels: Tensor, probabilities: Tensor, *, num_samples: int, are_labels_known: bool
) -> tuple[Tensor, Tensor]:
    order = ids.argsort()
    if not torch.equal(ids[order], torch.arange(num_samples)):
        raise DataError(
            f"expected each of {num_samples} samples exactly once, "
            f"got {len(ids)} predictions for {len(set(ids.tolist()))} samples"
        )
    labels = labels[order]
    num_classes = probabilities.shape[2]
    if are_labels_known and (int(labels.min()) < 0 or int(labels.max()) >= num_classes):
        raise DataError(
            f"expected labels from 0 to {num_classes - 1}, got labels from {int(labels.min())} to {int(labels.max())}"
        )
    return probabilities[:, order], labels
