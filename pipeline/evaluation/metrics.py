"""Metrics as functions of probabilities and labels (FreeTickets, arXiv 2106.14568, section 5).

``probabilities`` are [images, classes], or [tickets, images, classes] where tickets are compared;
every row sums to 1. ``labels`` are integers [images]. Results are Python floats; sums are taken in
float64. Only torch is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# The corruptions that CIFAR-C and ImageNet-C contain besides the 15 of the benchmark, for
# choosing hyperparameters (arXiv 1903.12261).
EXTRA_CORRUPTIONS = ("gaussian_blur", "saturate", "spatter", "speckle_noise")
SMALLEST_PROBABILITY = 2.0**-126  # smallest normal float32: logarithms are taken of at least this


def top1(probabilities: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose most probable class is the label; a tie goes to the lowest class."""
    return _mean(predicted_classes(probabilities) == labels)


def predicted_classes(probabilities: Tensor) -> Tensor:
    """Return the most probable class of each image, the lowest of a tie: [images, classes] -> [images]."""
    # which of several equal values torch.argmax returns is not specified
    return (probabilities == probabilities.amax(dim=1, keepdim=True)).int().argmax(dim=1)


def top5(probabilities: Tensor, labels: Tensor) -> float:
    """Return the fraction of images whose label is among the five most probable classes; see :func:`is_top5`."""
    return _mean(is_top5(probabilities, labels))


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Return the negative log-likelihood of the labels in nats, mean over images."""
    return _mean(nll_of_images(probabilities, labels))


def is_top5(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return whether each image's label is among the five most probable classes (or all, if fewer): bool [images].

    Of equal probabilities the lower class ranks first, as in :func:`predicted_classes`. The rank of
    the label is therefore the number of more probable classes plus the number of lower, equally
    probable ones.
    """
    # torch.topk takes equal values in any order
    of_label = probabilities.gather(1, labels[:, None])
    is_lower = torch.arange(probabilities.shape[1], device=labels.device) < labels[:, None]
    ranks = ((probabilities > of_label) | ((probabilities == of_label) & is_lower)).sum(dim=1)
    return ranks < 5


def nll_of_images(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood of each image's label in nats: float64 [images]."""
    return -_log(probabilities.gather(1, labels[:, None])).squeeze(1)


def brier(probabilities: Tensor, labels: Tensor) -> float:
    """Return the Brier score, from 0 to 2.

    It is the squared distance between the probabilities and the one-hot label, summed over classes,
    mean over images.
    """
    of_label = probabilities.gather(1, labels[:, None]).squeeze(1).double()
    return _mean(probabilities.double().square().sum(dim=1) - 2 * of_label + 1)


class Bin(NamedTuple):
    """The images of one interval of confidence."""

    num_images: int
    num_right: float  # number of images that are classified correctly
    confidence: float  # sum over the images


def reliability(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> list[Bin]:
    """Sort images into ``num_bins`` equal intervals of confidence, for a reliability diagram.

    The intervals cover (0, 1] and are closed on the right (Guo et al., arXiv 1706.04599).
    """
    confidence, is_right = _confidence(probabilities, labels)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64, device=confidence.device)
    bins = torch.bucketize(confidence, edges[1:-1])  # edge i−1 < confidence <= edge i
    sums = torch.zeros(3, num_bins, dtype=torch.float64, device=confidence.device)
    sums.index_add_(1, bins, torch.stack([torch.ones_like(confidence), is_right, confidence]))
    return [Bin(int(n), right, confident) for n, right, confident in sums.T.tolist()]


def ece(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Return the expected calibration error (ECE).

    It is the mean over images of |accuracy − confidence| of their bin, with the bins of
    :func:`reliability`.
    """
    bins = reliability(probabilities, labels, num_bins=num_bins)
    return sum(abs(each.num_right - each.confidence) for each in bins) / labels.numel()


def adaptive_ece(probabilities: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Return the ECE over bins with equal numbers of images (Nguyen and O'Connor, arXiv 1508.05154).

    Images are sorted by confidence. If their number is not divisible by ``num_bins``, the first bins
    have one image more. Each image counts with the accuracy of all images of the same confidence, so
    that the order among those does not matter.
    """
    confidence, is_right = _confidence(probabilities, labels)
    _, group, group_size = torch.unique(
        confidence, return_inverse=True, return_counts=True
    )  # groups in order of confidence
    share_right = (
        torch.zeros(len(group_size), dtype=torch.float64, device=group.device).index_add_(0, group, is_right)
        / group_size
    )
    gaps = (share_right[group] - confidence)[group.argsort()]
    return sum(abs(float(part.sum())) for part in torch.tensor_split(gaps, num_bins)) / labels.numel()


def disagreement_matrix(probabilities: Tensor) -> Tensor:
    """Return the fraction of images on which tickets i and j predict different classes.

    Args:
        probabilities: [tickets, images, classes].

    Returns:
        A symmetric matrix, float64 [tickets, tickets].
    """
    predictions = torch.stack([predicted_classes(of_ticket) for of_ticket in probabilities])
    return torch.stack([(predictions != one).double().mean(dim=1) for one in predictions])


def disagreement(probabilities: Tensor) -> float:
    """Return the fraction of images on which two tickets predict different classes, mean over pairs.

    ``probabilities`` is [tickets, images, classes], with at least two tickets.
    """
    num_tickets = len(probabilities)
    assert num_tickets >= 2, "diversity is a property of at least two tickets"
    return float(disagreement_matrix(probabilities).sum()) / (num_tickets * (num_tickets - 1))


def pairwise_kl(probabilities: Tensor) -> float:
    """Return KL(p_i ‖ p_j) = Σ p_i·(log p_i − log p_j) in nats, mean over images and ordered pairs i ≠ j.

    ``probabilities`` is [tickets, images, classes], with at least two tickets.
    """
    num_tickets, num_images, _ = probabilities.shape
    assert num_tickets >= 2, "diversity is a property of at least two tickets"
    total = 0.0
    for block in torch.split(probabilities, 4096, dim=1):
        p, log_p = block.double(), _log(block)
        # Σ_i Σ_j p_i·(log p_i − log p_j) without a loop over pairs; terms with i = j are 0
        total += float(num_tickets * (p * log_p).sum() - (p.sum(dim=0) * log_p.sum(dim=0)).sum())
    return max(0.0, total) / (num_images * num_tickets * (num_tickets - 1))


def ensemble(probabilities: Tensor) -> Tensor:
    """Average the tickets' probabilities: [tickets, images, classes] -> [images, classes]."""
    return probabilities.mean(dim=0)


def max_softmax(probabilities: Tensor) -> Tensor:
    """Return the largest probability of each image, [images].

    As a score it is higher for images of known classes (Hendrycks and Gimpel, arXiv 1610.02136).
    """
    return probabilities.amax(dim=1).double()


def negative_entropy(probabilities: Tensor) -> Tensor:
    """Return Σ p·log p of each image, [images]; as a score it is higher for images of known classes."""
    return (probabilities.double() * _log(probabilities)).sum(dim=1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max_softmax": max_softmax, "entropy": negative_entropy}


def ood_auroc(known: Tensor, other: Tensor) -> float:
    """Return the area under the ROC curve for separating known images from others by their scores.

    It is the probability that a known image scores higher than another image; a tie counts half.
    ``known`` and ``other`` are scores: [images], [other images].
    """
    in_order = other.sort().values
    below, not_above = (torch.searchsorted(in_order, known, right=right).double() for right in (False, True))
    return float((below + not_above).mean()) / (2 * other.numel())


def ood_fpr95(known: Tensor, other: Tensor) -> float:
    """Return the false positive rate at a true positive rate of at least 95%.

    It is the fraction of other images that score at least the highest threshold that 95% of the
    known images reach. ``known`` and ``other`` are scores: [images], [other images].
    """
    num_accepted = math.ceil(0.95 * known.numel())
    threshold = known.sort(descending=True).values[num_accepted - 1]
    return _mean(other >= threshold)


def corruption_mean(values: Mapping[str, Mapping[int, float]]) -> float:
    """Return the mean over corruptions of the mean over severities (FreeTickets' cAcc, cNLL, cECE).

    ``values`` is corruption -> severity -> value.
    """
    of_corruptions = [sum(by_severity.values()) / len(by_severity) for by_severity in values.values()]
    return sum(of_corruptions) / len(of_corruptions)


def scaled(probabilities: Tensor, temperature: float) -> Tensor:
    """Return softmax(logits / temperature), computed from probabilities: float64 [images, classes].

    It equals p^(1/temperature), normalised.
    """
    return (_log(probabilities) / temperature).softmax(dim=1)


def best_temperature(probabilities: Tensor, labels: Tensor) -> float:
    """Return the temperature between 0.05 and 20 with the lowest NLL (Guo et al., arXiv 1706.04599)."""
    log_p = _log(probabilities)
    of_labels = log_p.gather(1, labels[:, None]).mean()
    low, high, inverse = 1 / 20, 1 / 0.05, 1.0
    # The NLL is convex in 1/temperature, and its slope is the mean of E[log p] − log p(label).
    # Newton's method; a step out of the bracket is replaced by bisection.
    for _ in range(50):
        p = (inverse * log_p).softmax(dim=1)
        expected = (p * log_p).sum(dim=1)
        slope = float(expected.mean() - of_labels)
        curvature = float(((p * log_p.square()).sum(dim=1) - expected.square()).mean())
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) < 1e-6 * inverse:
            break
        inverse = following
    return 1 / following


def _confidence(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image's largest probability, and 1 where its class is the label: both float64 [images]."""
    return probabilities.amax(dim=1).double(), (predicted_classes(probabilities) == labels).double()


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.double().clamp_min(SMALLEST_PROBABILITY).log()


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
