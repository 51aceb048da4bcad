"""Metrics against numbers worked by hand, and against torchmetrics where it means the same."""

from __future__ import annotations

import math

import pytest
import torch

from pipeline.evaluation import metrics

# Three images, three classes: right with confidence 0.7; wrong with 0.5; right with 0.4.
PROBABILITIES = torch.tensor([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.3, 0.3, 0.4]])
LABELS = torch.tensor([0, 0, 2])


def test_by_hand() -> None:
    assert metrics.top1(PROBABILITIES, LABELS) == pytest.approx(2 / 3)
    assert metrics.nll(PROBABILITIES, LABELS) == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.4)) / 3)
    # (0.3² + 0.2² + 0.1²) + (0.7² + 0.5² + 0.2²) + (0.3² + 0.3² + 0.6²) = 0.14 + 0.78 + 0.54
    assert metrics.brier(PROBABILITIES, LABELS) == pytest.approx(1.46 / 3)
    # Each image is alone in its bin: |1 − 0.7| + |0 − 0.5| + |1 − 0.4| = 1.4
    assert metrics.ece(PROBABILITIES, LABELS) == pytest.approx(1.4 / 3)


def test_top5_of_six_classes() -> None:
    probabilities = torch.tensor([[0.3, 0.25, 0.2, 0.15, 0.06, 0.04]] * 2)
    assert metrics.top5(probabilities, torch.tensor([4, 5])) == 0.5
    assert metrics.top5(PROBABILITIES, LABELS) == 1.0  # fewer than five classes


def test_the_lowest_class_wins_a_tie() -> None:
    assert metrics.top1(torch.tensor([[0.25, 0.375, 0.375]] * 2), torch.tensor([1, 2])) == 0.5


@pytest.mark.parametrize(
    ("confidences", "is_right", "expected"),
    [
        ([0.61, 0.65], [1, 0], 0.5 * abs(1 - 1.26)),  # one bin (0.6, 0.667]: |1/2 − 0.63| for both images
        ([0.61, 0.72], [1, 0], (0.39 + 0.72) / 2),  # two bins
        ([2 / 3 - 1e-6, 2 / 3 + 1e-3], [1, 0], (1 / 3 + 2 / 3) / 2),  # 10/15 is an edge between true bins: 14 bins would share
        ([0.9, 0.95], [1, 0], (0.1 + 0.95) / 2),  # 14/15 is the last inner edge
        ([1.0, 1.0], [1, 1], 0.0),
        ([1.0, 1.0], [0, 0], 1.0),
    ],
)
def test_ece_bins(confidences: list[float], is_right: list[int], expected: float) -> None:
    probabilities = torch.tensor([[confidence, 1 - confidence] for confidence in confidences], dtype=torch.float64)
    labels = 1 - torch.tensor(is_right)
    assert metrics.ece(probabilities, labels) == pytest.approx(expected, abs=1e-3)


def test_nll_of_a_probability_that_underflowed_is_finite() -> None:
    assert metrics.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == pytest.approx(126 * math.log(2))


def test_disagreement_is_a_mean_over_pairs() -> None:
    # Predictions of three tickets on four images; they differ on 1, 2 and 1 of 4.
    predictions = torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 1, 0]])
    probabilities = torch.nn.functional.one_hot(predictions, 2).float()
    assert metrics.disagreement(probabilities) == pytest.approx((1 + 2 + 1) / 4 / 3)
    assert metrics.disagreement(probabilities[[0, 0]]) == 0.0


def test_kl_by_hand() -> None:
    p, q = [0.5, 0.5], [0.25, 0.75]
    of_p_and_q = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    of_q_and_p = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert metrics.pairwise_kl(torch.tensor([[p], [q]])) == pytest.approx((of_p_and_q + of_q_and_p) / 2)
    assert metrics.pairwise_kl(torch.tensor([[p, q], [p, q]])) == 0.0


def test_kl_is_a_mean_over_ordered_pairs_and_images() -> None:
    probabilities = torch.rand(4, 5000, 3, generator=torch.Generator().manual_seed(0)).double().softmax(dim=2)
    pairs = [(p * (p / q).log()).sum(dim=1).mean() for i, p in enumerate(probabilities) for j, q in enumerate(probabilities) if i != j]
    assert metrics.pairwise_kl(probabilities) == pytest.approx(float(torch.stack(pairs).mean()))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(metrics.ensemble(torch.stack([one, other])), torch.tensor([[0.55, 0.45]]))


def test_diversity_needs_two_tickets() -> None:
    for diversity in (metrics.disagreement, metrics.pairwise_kl):
        with pytest.raises(AssertionError):
            diversity(PROBABILITIES[None])


def test_against_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(2000, 20, generator=generator)).softmax(dim=1)
    labels = torch.where(torch.rand(2000, generator=generator) < 0.6, probabilities.argmax(dim=1), torch.randint(20, (2000,)))
    for k, metric in ((1, metrics.top1), (5, metrics.top5)):
        theirs = multiclass_accuracy(probabilities, labels, num_classes=20, average="micro", top_k=k)
        assert metric(probabilities, labels) == pytest.approx(float(theirs))
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=20, n_bins=15, norm="l1")
    assert metrics.ece(probabilities, labels) == pytest.approx(float(theirs), abs=1e-6)
    assert metrics.nll(probabilities, labels) == pytest.approx(float(torch.nn.functional.nll_loss(probabilities.log(), labels)), rel=1e-6)
