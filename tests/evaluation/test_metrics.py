"""Metrics, compared with numbers computed by hand, and with torchmetrics where it means the same."""

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
    even = torch.full((8, 8), 1 / 8)
    assert metrics.top5(even[:1], torch.tensor([0])) == 1.0
    assert metrics.is_top5(even, torch.arange(8)).tolist() == [True] * 5 + [False] * 3
    assert metrics.is_top5(even.flip(0)[:, :4], torch.tensor([0, 1, 2, 3] * 2)).all()  # fewer than five classes
    # class 6 is ahead of all, 1, 3, 4, 5 and 7 share the second place: 5 and 7 are the sixth and the seventh
    shared = torch.tensor([[0.05, 0.15, 0.04, 0.15, 0.15, 0.15, 0.2, 0.15]] * 8)
    assert metrics.is_top5(shared, torch.arange(8)).int().tolist() == [0, 1, 0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("num_tickets", [1, 4])
def test_networks_and_ensembles_in_bfloat16_rank_as_a_stable_sort_of_the_classes(num_tickets: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(num_tickets, 300, 1000, generator=generator)).bfloat16()
    logits[:, :20] = logits[0, :20].round()  # dozens of ties, also at the first place
    probabilities = logits.float().softmax(dim=2).mean(dim=0)
    best_first = [sorted(range(1000), key=lambda c: -row[c]) for row in probabilities.tolist()]  # sorted() is stable
    values = probabilities.sort(dim=1, descending=True).values
    num_tied = int((values[:, 4] == values[:, 5]).sum())
    assert num_tied >= 10  # images that need the rule
    assert metrics.predicted_classes(probabilities).tolist() == [row[0] for row in best_first]
    for place in range(8):
        labels = torch.tensor([row[place] for row in best_first])
        assert bool((metrics.is_top5(probabilities, labels) == (place < 5)).all())


@pytest.mark.parametrize(
    ("confidences", "is_right", "expected"),
    [
        ([0.61, 0.65], [1, 0], 0.5 * abs(1 - 1.26)),  # one bin (0.6, 0.667]: |1/2 − 0.63| for both images
        ([0.61, 0.72], [1, 0], (0.39 + 0.72) / 2),  # two bins
        (
            [2 / 3 - 1e-6, 2 / 3 + 1e-3],
            [1, 0],
            (1 / 3 + 2 / 3) / 2,
        ),  # 10/15 is an edge between true bins: 14 bins would share
        ([0.9, 0.95], [1, 0], (0.1 + 0.95) / 2),  # 14/15 is the last inner edge
        ([1.0, 1.0], [1, 1], 0.0),
        ([1.0, 1.0], [0, 0], 1.0),
    ],
)
def test_ece_bins(confidences: list[float], is_right: list[int], expected: float) -> None:
    probabilities = torch.tensor([[confidence, 1 - confidence] for confidence in confidences], dtype=torch.float64)
    labels = 1 - torch.tensor(is_right)
    assert metrics.ece(probabilities, labels) == pytest.approx(expected, abs=1e-3)


def test_reliability_by_hand() -> None:
    bins = metrics.reliability(
        PROBABILITIES, LABELS, num_bins=2
    )  # (0, 0.5] has the wrong image of 0.5 and the right one of 0.4
    assert [(each.num_images, each.num_right) for each in bins] == [(2, 1.0), (1, 1.0)]
    assert [each.confidence for each in bins] == pytest.approx([0.9, 0.7])


def two_classes(confidences: list[float], is_right: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([[c, 1 - c] for c in confidences], dtype=torch.float64), 1 - torch.tensor(is_right)


def test_adaptive_ece_by_hand() -> None:
    # Two bins of two in order of confidence: |1 − 1.2| for 0.55 and 0.65, |1 − 1.7| for 0.8 and 0.9.
    given = two_classes([0.9, 0.55, 0.8, 0.65], [0, 0, 1, 1])
    assert metrics.adaptive_ece(*given, num_bins=2) == pytest.approx((0.2 + 0.7) / 4)
    # Three into two bins: the first has two, |1 − 1.1|, the second |0 − 0.9|.
    assert metrics.adaptive_ece(*two_classes([0.9, 0.6, 0.5], [0, 1, 0]), num_bins=2) == pytest.approx((0.1 + 0.9) / 3)
    # Fewer images than bins: each alone, as ece has them.
    assert metrics.adaptive_ece(PROBABILITIES, LABELS) == pytest.approx(1.4 / 3)


def test_adaptive_ece_does_not_depend_on_the_order_of_equal_confidences() -> None:
    one = metrics.adaptive_ece(*two_classes([0.75, 0.75, 0.75, 0.75], [1, 1, 0, 0]), num_bins=2)
    other = metrics.adaptive_ece(*two_classes([0.75, 0.75, 0.75, 0.75], [0, 1, 0, 1]), num_bins=2)
    assert one == other == 0.25  # all four are right half of the time


def test_adaptive_ece_is_ece_with_the_quantiles_as_edges() -> None:
    probabilities, labels = random_predictions()
    confidence, is_right = probabilities.amax(dim=1), probabilities.argmax(dim=1) == labels
    parts = torch.tensor_split(confidence.argsort(), 15)
    expected = sum(abs(float((is_right[part].double() - confidence[part].double()).sum())) for part in parts) / len(
        labels
    )
    assert metrics.adaptive_ece(probabilities, labels) == pytest.approx(expected)


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
    pairs = [
        (p * (p / q).log()).sum(dim=1).mean()
        for i, p in enumerate(probabilities)
        for j, q in enumerate(probabilities)
        if i != j
    ]
    assert metrics.pairwise_kl(probabilities) == pytest.approx(float(torch.stack(pairs).mean()))


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(metrics.ensemble(torch.stack([one, other])), torch.tensor([[0.55, 0.45]]))


def test_diversity_needs_two_tickets() -> None:
    for diversity in (metrics.disagreement, metrics.pairwise_kl):
        with pytest.raises(AssertionError):
            diversity(PROBABILITIES[None])


def test_disagreement_matrix() -> None:
    probabilities = torch.nn.functional.one_hot(torch.tensor([[0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 1, 0]]), 2).float()
    assert metrics.disagreement_matrix(probabilities).tolist() == [[0, 0.25, 0.5], [0.25, 0, 0.25], [0.5, 0.25, 0]]


def test_scores_by_hand() -> None:
    assert metrics.max_softmax(PROBABILITIES).tolist() == pytest.approx([0.7, 0.5, 0.4])
    assert metrics.negative_entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist() == pytest.approx(
        [-math.log(2), 0.0]
    )


@pytest.mark.parametrize(
    ("known", "other", "auroc", "fpr95"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0, 0.0),
        ([1.0, 2.0], [3.0, 4.0], 0.0, 1.0),
        ([1.0, 1.0], [1.0, 1.0], 0.5, 1.0),  # nothing but ties
        (
            [2.0, 3.0],
            [1.0, 2.0],
            (0.5 + 3) / 4,
            0.5,
        ),  # of four pairs one is a tie; both known ones reach 2, as does one other
        ([1.0, 3.0], [2.0], 0.5, 1.0),
    ],
)
def test_detection_by_hand(known: list[float], other: list[float], auroc: float, fpr95: float) -> None:
    assert metrics.ood_auroc(torch.tensor(known), torch.tensor(other)) == auroc
    assert metrics.ood_fpr95(torch.tensor(known), torch.tensor(other)) == fpr95


def test_the_threshold_of_fpr95_lets_exactly_95_of_100_pass() -> None:
    known = torch.arange(100.0)  # 5 … 99 pass at threshold 5
    assert metrics.ood_fpr95(known, torch.tensor([4.0, 4.9, 5.0, 60.0])) == 0.5


def test_corruption_mean() -> None:
    assert metrics.corruption_mean({"fog": {1: 0.5, 2: 0.75}, "snow": {1: 0.25}}) == (0.625 + 0.25) / 2


def test_temperature_by_hand() -> None:
    # logits ±log 3 (p = 0.75) right in 9 of 10: calibrated where p = 0.9, so 1/T = log 9 / log 3 = 2.
    probabilities = torch.tensor([[0.75, 0.25]] * 10)
    labels = torch.tensor([0] * 9 + [1])
    assert metrics.best_temperature(probabilities, labels) == pytest.approx(0.5, rel=1e-5)
    torch.testing.assert_close(metrics.scaled(probabilities, 0.5)[0], torch.tensor([0.9, 0.1], dtype=torch.float64))
    assert metrics.best_temperature(probabilities, labels * 0) == pytest.approx(
        0.05, rel=1e-3
    )  # always right: as sure as allowed
    assert (
        metrics.best_temperature(torch.full((4, 2), 0.5), torch.tensor([0, 1, 0, 1])) > 0
    )  # every temperature is as good


def test_the_best_temperature_undoes_a_scaling_of_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20000, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=1), 1, generator=generator).view(-1)
    assert metrics.best_temperature((3 * logits).softmax(dim=1), labels) == pytest.approx(3, rel=0.03)


def random_predictions() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    probabilities = (3 * torch.randn(2000, 20, generator=generator)).softmax(dim=1)
    random = torch.randint(20, (2000,), generator=generator)
    return probabilities, torch.where(torch.rand(2000, generator=generator) < 0.6, probabilities.argmax(dim=1), random)


def test_against_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

    probabilities, labels = random_predictions()
    for k, metric in ((1, metrics.top1), (5, metrics.top5)):
        theirs = multiclass_accuracy(probabilities, labels, num_classes=20, average="micro", top_k=k)
        assert metric(probabilities, labels) == pytest.approx(float(theirs))
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=20, n_bins=15, norm="l1")
    assert metrics.ece(probabilities, labels) == pytest.approx(float(theirs), abs=1e-6)
    assert metrics.nll(probabilities, labels) == pytest.approx(
        float(torch.nn.functional.nll_loss(probabilities.log(), labels)), rel=1e-6
    )


@pytest.mark.parametrize("num_values", [7, 10**6])  # with many ties, and with none
def test_detection_against_torchmetrics_and_scikit_learn(num_values: int) -> None:
    from sklearn.metrics import roc_auc_score, roc_curve
    from torchmetrics.functional.classification import binary_auroc

    generator = torch.Generator().manual_seed(0)
    known = torch.randint(num_values, (1000,), generator=generator) / num_values
    other = torch.randint(num_values, (700,), generator=generator).square() / num_values**2
    scores, is_known = torch.cat([known, other]), torch.cat([torch.ones(1000), torch.zeros(700)]).long()
    auroc = metrics.ood_auroc(known, other)
    assert auroc == pytest.approx(float(roc_auc_score(is_known, scores)))
    assert auroc == pytest.approx(float(binary_auroc(scores, is_known)), abs=1e-6)
    false_positives, true_positives, _ = roc_curve(is_known, scores, drop_intermediate=False)
    assert metrics.ood_fpr95(known, other) == pytest.approx(false_positives[(true_positives >= 0.95).argmax()])
