"""Adversarial images: one step along the sign of the gradient (FGSM, arXiv 1412.6572), and many with projection (PGD, arXiv 1706.06083).

White-box and untargeted: each row of a report is attacked through its own probabilities, an
ensemble through their mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.sparse.select import key_of, keyed_hash

Probabilities = Callable[[Tensor], Tensor]  # images -> [images, classes]

ATTACKS = ("fgsm", "pgd")
SMALLEST_PROBABILITY = 2.0**-126  # as in the metrics


@dataclass(frozen=True)
class Attack:
    """How far pixels may move, all in the network's normalised units: tensors [1, 3, 1, 1] on the device of the images."""

    epsilon: Tensor
    low: Tensor  # black
    high: Tensor  # white
    num_steps: int = 10  # of PGD, each of 2.5·epsilon / num_steps
    num_images: int | None = None  # so many of a set are attacked, evenly spread; None: all

    @classmethod
    def of(
        cls,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        epsilon: float,
        num_steps: int,
        device: torch.device,
        num_images: int | None = None,
    ) -> Self:
        """``epsilon``, ``mean`` and ``std`` on the 0–255 scale of pixels."""
        centre, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        return cls(epsilon / scale, -centre / scale, (255 - centre) / scale, num_steps, num_images)

    def chosen(self, ids: Tensor, num_samples: int) -> Tensor:
        """Which of these sample ids, of a set of ``num_samples``, are attacked: ⌊i·samples/images⌋ for i = 0, 1, … Boolean [ids]."""
        num = num_samples if self.num_images is None else min(self.num_images, num_samples)
        i = -(-ids * num // num_samples)
        return i * num_samples // num == ids

    def __call__(self, name: str, probabilities: Probabilities, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """The images that attack ``name`` makes of ``images`` with these labels and sample ids."""
        return (
            self.fgsm(probabilities, images, labels) if name == "fgsm" else self.pgd(probabilities, images, labels, ids)
        )

    def fgsm(self, probabilities: Probabilities, images: Tensor, labels: Tensor) -> Tensor:
        """Images one step of epsilon away, within black and white."""
        return self._clip(images + self.epsilon * _gradient(probabilities, images, labels).sign())

    def pgd(self, probabilities: Probabilities, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Images within epsilon after ``num_steps`` steps from a random start, a function of the sample id: equal on every rank."""
        moved = self._clip(images + self.epsilon * _noise(images, ids))
        for _ in range(self.num_steps):
            step = 2.5 / self.num_steps * self.epsilon * _gradient(probabilities, moved, labels).sign()
            moved = self._clip(torch.minimum(torch.maximum(moved + step, images - self.epsilon), images + self.epsilon))
        return moved

    def _clip(self, images: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images, self.low), self.high)


def _gradient(probabilities: Probabilities, images: Tensor, labels: Tensor) -> Tensor:
    """Of the summed NLL with respect to the images: no image's gradient depends on its neighbours in the batch."""
    with torch.enable_grad():
        at = images.detach().requires_grad_()
        of_labels = probabilities(at).gather(1, labels[:, None])
        loss = -of_labels.clamp_min(SMALLEST_PROBABILITY).log().sum()
        return torch.autograd.grad(loss, at)[0]


def _noise(images: Tensor, ids: Tensor) -> Tensor:
    """Uniform in [−1, 1), from a hash of sample id and position."""
    parts = [keyed_hash(key_of(sample), images[0].numel(), device=images.device) for sample in ids.tolist()]
    return torch.stack(parts).view(images.shape).to(images.dtype) / 2.0**30 - 1
