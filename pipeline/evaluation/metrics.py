"""Metrics as functions of probabilities and labels (FreeTickets, arXiv 2106.14568, section 5). torch only.

``probabilities`` are [images, classes], or [tickets, images, classes] for diversity; every row sums to 1. ``labels`` are
integers [images]. Results are Python floats; sums are taken in float64.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

SMALLEST_PROBABILITY = 2.0**-126  # smallest normal float32: a probability that underflowed counts as this in logarithms


def top1(probabilities: Tensor, labels: Tensor) -> float:
    """Fraction of images whose most probable class is the label; the lowest class wins a tie."""
    return _mean(_first_argmax(probabilities) == labels)


def top5(probabilities: Tensor, labels: Tensor) -> float:
    """Fraction of images whose label is among the five most probable classes (all classes, when there are fewer)."""
    num_best = min(5, probabilities.shape[1])
    return _mean((probabilities.topk(num_best, dim=1).indices == labels[:, None]).any(dim=1))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Negative log-likelihood of the labels in nats, mean over all images."""
    return _mean(-_log(probabilities.gather(1, labels[:, None])))


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Squared distance between probabilities and the one-hot label, summed over classes (0 to 2), mean over images."""
    of_label = probabilities.gather(1, labels[:, None]).squeeze(1).double()
    return _mean(probabilities.double().square().sum(dim=1) - 2 * of_label + 1)


def ece(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Expected calibration error: mean over images of |accuracy − confidence| of their bin (Guo et al., arXiv 1706.04599).

    The bins are ``num_bins`` equal intervals of (0, 1], closed on the right.
    """
    confidence = probabilities.amax(dim=1).double()
    is_right = (_first_argmax(probabilities) == labels).double()
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])  # edge i−1 < confidence <= edge i
    gap = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device).index_add_(0, bins, is_right - confidence)
    return float(gap.abs().sum() / labels.numel())


def disagreement(probabilities: Tensor) -> float:
    """Fraction of images on which two tickets predict different classes, mean over pairs. [tickets, images, classes]"""
    predictions = [_first_argmax(of_ticket) for of_ticket in probabilities]
    of_pairs = [_mean(one != other) for one, other in combinations(predictions, 2)]
    assert of_pairs, "diversity is a property of at least two tickets"
    return sum(of_pairs) / len(of_pairs)


def pairwise_kl(probabilities: Tensor) -> float:
    """KL(p_i ‖ p_j) = Σ p_i·(log p_i − log p_j) in nats, mean over images and ordered pairs i ≠ j. [tickets, images, classes]"""
    num_tickets, num_images, _ = probabilities.shape
    assert num_tickets >= 2, "diversity is a property of at least two tickets"
    total = 0.0
    for block in torch.split(probabilities, 4096, dim=1):
        p, log_p = block.double(), _log(block)
        # Σ_i Σ_j p_i·(log p_i − log p_j), where i = j adds 0, without a loop over pairs.
        total += float(num_tickets * (p * log_p).sum() - (p.sum(dim=0) * log_p.sum(dim=0)).sum())
    return max(0.0, total) / (num_images * num_tickets * (num_tickets - 1))


def ensemble(probabilities: Tensor) -> Tensor:
    """Mean of the tickets' probabilities: [tickets, images, classes] -> [images, classes]."""
    return probabilities.mean(dim=0)


def _first_argmax(probabilities: Tensor) -> Tensor:
    """torch.argmax does not promise which of equal values it names; this is the first. [images, classes] -> [images]"""
    return (probabilities == probabilities.amax(dim=1, keepdim=True)).int().argmax(dim=1)


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.double().clamp_min(SMALLEST_PROBABILITY).log()


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
