"""Adversarial images: FGSM (arXiv 1412.6572) and PGD (arXiv 1706.06083).

FGSM takes one step along the sign of the gradient, PGD takes many and projects after each. The
attacks are white-box and untargeted: each row of a report is attacked through its own
probabilities, an ensemble through the mean of its members' probabilities.
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
    """The strength of an attack, and which images it changes.

    ``epsilon``, ``low`` and ``high`` are in the network's normalised units: tensors [1, 3, 1, 1] on
    the device of the images.
    """

    epsilon: Tensor  # how far a pixel may move
    low: Tensor  # black
    high: Tensor  # white
    num_steps: int = 10  # number of PGD steps; each has size 2.5·epsilon / num_steps
    num_images: int | None = None  # number of images of a set to attack, evenly spaced; None: all

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
        """Build an attack from ``epsilon``, ``mean`` and ``std`` on the 0–255 scale of pixels."""
        centre, scale = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (mean, std))
        return cls(epsilon / scale, -centre / scale, (255 - centre) / scale, num_steps, num_images)

    def chosen(self, ids: Tensor, num_samples: int) -> Tensor:
        """Return which of the sample ``ids`` of a set of ``num_samples`` are attacked: boolean [ids].

        The attacked ids are ⌊i · num_samples / num_images⌋ for i = 0, 1, ….
        """
        num = num_samples if self.num_images is None else min(self.num_images, num_samples)
        i = -(-ids * num // num_samples)
        return i * num_samples // num == ids

    def __call__(self, name: str, probabilities: Probabilities, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Return ``images`` changed by the attack called ``name``, one of ``ATTACKS``."""
        return (
            self.fgsm(probabilities, images, labels) if name == "fgsm" else self.pgd(probabilities, images, labels, ids)
        )

    def fgsm(self, probabilities: Probabilities, images: Tensor, labels: Tensor) -> Tensor:
        """Return images one step of epsilon away, clipped to black and white."""
        return self._clip(images + self.epsilon * _gradient(probabilities, images, labels).sign())

    def pgd(self, probabilities: Probabilities, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        """Return images within epsilon of the given ones, after ``num_steps`` steps from a random start.

        The start is a function of the sample id, so it does not depend on the number of ranks.
        """
        moved = self._clip(images + self.epsilon * _noise(images, ids))
        for _ in range(self.num_steps):
            step = 2.5 / self.num_steps * self.epsilon * _gradient(probabilities, moved, labels).sign()
            moved = self._clip(torch.minimum(torch.maximum(moved + step, images - self.epsilon), images + self.epsilon))
        return moved

    def _clip(self, images: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(images, self.low), self.high)


def _gradient(probabilities: Probabilities, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the summed NLL with respect to the images.

    It is a sum, not a mean, so that an image's gradient does not depend on the rest of the batch.
    """
    with torch.enable_grad():
        at = images.detach().requires_grad_()
        of_labels = probabilities(at).gather(1, labels[:, None])
        loss = -of_labels.clamp_min(SMALLEST_PROBABILITY).log().sum()
        return torch.autograd.grad(loss, at)[0]


def _noise(images: Tensor, ids: Tensor) -> Tensor:
    """Return numbers uniform in [−1, 1), from a hash of sample id and position; shaped like ``images``."""
    parts = [keyed_hash(key_of(sample), images[0].numel(), device=images.device) for sample in ids.tolist()]
    return torch.stack(parts).view(images.shape).to(images.dtype) / 2.0**30 - 1
