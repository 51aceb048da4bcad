"""Prediction in one process; test_ranks.py has the same over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pipeline.errors import DataError, NumericsError
from pipeline.evaluation.attacks import Attack
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.score import score


@dataclass
class Loader:
    """Image i is the number i; like FFCV, it uses the same memory for every batch."""

    ids: list[list[int]]
    labels: list[int]
    num_samples: int

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ids, images, labels = torch.empty(2, dtype=torch.long), torch.empty(2, 1), torch.empty(2, dtype=torch.long)
        for batch in self.ids:
            n = len(batch)
            ids[:n] = torch.tensor(batch)
            images[:n, 0] = ids[:n].float()
            labels[:n] = torch.tensor([self.labels[i] for i in batch])
            yield ids[:n], images[:n], labels[:n]


class Logits(nn.Module):
    """log-odds ``slope``·image for class 1 of 2."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(images), self.slope * images], dim=1)


def test_probabilities_come_in_sample_order_for_every_model() -> None:
    loader = Loader([[2, 0], [1, 4], [3]], [0, 1, 0, 1, 1], 5)
    predicted = predict(Networks([Logits(0.0), Logits(1.0)]), loader, num_classes=2)
    assert predicted is not None
    probabilities, labels = predicted
    assert labels.tolist() == [0, 1, 0, 1, 1]
    torch.testing.assert_close(probabilities[0], torch.full((5, 2), 0.5))
    torch.testing.assert_close(probabilities[1, :, 1], torch.arange(5.0).sigmoid())
    assert probabilities.dtype == torch.float32 and not probabilities.requires_grad


def test_under_autocast_probabilities_are_float32_and_sum_to_one() -> None:
    predicted = predict(
        Networks([nn.Linear(1, 2)], autocast_dtype=torch.bfloat16), Loader([[0, 1]], [0, 1], 2), num_classes=2
    )
    assert predicted is not None and predicted[0].dtype == torch.float32
    torch.testing.assert_close(predicted[0].sum(dim=2), torch.ones(1, 2))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([[0, 1], [1, 2]], "got 4 predictions for 3 samples"), ([[0, 2]], "got 2 predictions for 2 samples")],
)
def test_each_sample_must_come_exactly_once(ids: list[list[int]], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        predict(Networks([Logits(1.0)]), Loader(ids, [0, 0, 0], 3), num_classes=2)


def test_a_label_out_of_range_is_refused() -> None:
    with pytest.raises(DataError, match="expected labels from 0 to 1, got labels from 0 to 2"):
        predict(Networks([Logits(1.0)]), Loader([[0, 1]], [0, 2], 2), num_classes=2)


def test_a_score_needs_every_image_with_a_label_of_the_network() -> None:
    for loader, got in (
        (Loader([[0, 1]], [0, 2], 2), "got 2 images, 1 of them with other labels"),
        (Loader([[0]], [0, 0], 2), "got 1 images"),
    ):
        with pytest.raises(DataError, match=f"expected 2 images with labels from 0 to 1 in an evaluation, {got}"):
            score(Networks([Logits(1.0)]), loader, num_classes=2)


def test_of_equally_probable_classes_the_lower_one_ranks_first_in_a_score() -> None:
    even = nn.Linear(1, 8).requires_grad_(False)
    even.weight.zero_()
    even.bias.copy_(1 + torch.arange(8) * 2**-12)  # different in float32, equal in bfloat16
    loader = Loader([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 1, 2, 3, 4, 5, 6, 7], 8)
    (in_float32,) = score(Networks([even]), loader, num_classes=8)
    (in_bfloat16,) = score(Networks([even], autocast_dtype=torch.bfloat16), loader, num_classes=8)
    assert (in_float32.top1, in_float32.top5) == (1 / 8, 5 / 8)
    assert (in_bfloat16.top1, in_bfloat16.top5) == (1 / 8, 5 / 8)
    labels_0 = Loader(loader.ids, [0] * 8, 8)
    (in_float32,) = score(Networks([even]), labels_0, num_classes=8)
    (in_bfloat16,) = score(Networks([even], autocast_dtype=torch.bfloat16), labels_0, num_classes=8)
    assert (in_float32.top1, in_float32.top5) == (0.0, 0.0)
    assert (in_bfloat16.top1, in_bfloat16.top5) == (1.0, 1.0)


def test_labels_of_other_classes_are_not_looked_at() -> None:
    predicted = predict(Networks([Logits(1.0)]), Loader([[0, 1]], [0, 2000], 2), num_classes=2, are_labels_known=False)
    assert predicted is not None and predicted[1].tolist() == [0, 2000]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite_name_their_network(value: float) -> None:
    models = [Logits(1.0), Logits(value), Logits(2.0)]
    with pytest.raises(NumericsError, match="predictions of ticket-1 are not finite"):
        predict(
            Networks(models, names=["ticket-0", "ticket-1", "ticket-2"]), Loader([[0, 1]], [0, 0], 2), num_classes=2
        )


class Left(nn.Module):
    """log-odds of class 1: the leftmost pixel of a row of three, [images, channels, 1, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(images)), self.scale * images[:, 0, 0, 0]], dim=1)


def test_with_flip_the_mirror_image_counts() -> None:
    images = torch.tensor([[1.0, 5.0, -1.0], [2.0, 7.0, 2.0]]).view(2, 1, 1, 3)
    expected = [(torch.tensor(1.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2, torch.tensor(2.0).sigmoid()]
    torch.testing.assert_close(Networks([Left()], flip=True)(images)[0, :, 1], torch.stack(expected))


class Rows:
    num_samples = 2

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for i in (1, 0):
            yield (
                torch.tensor([i]),
                torch.tensor([[0.05, 0.0, 0.0], [0.5, 0.0, 0.0]]).view(2, 1, 1, 3)[[i]],
                torch.tensor([1]),
            )


def test_every_ensemble_is_attacked_through_its_own_mean() -> None:
    """The second network is the opposite of the first, twice as strong.

    Brighter pixels therefore fool the ensemble, while darker ones fool the first network.
    """
    models = [Left(), Left()]
    models[1].scale.data.fill_(-2.0)
    attack = Attack.of([0.0], [255.0], epsilon=25.5, num_steps=5, device=torch.device("cpu"))  # ± 0.1, black is 0
    predicted = predict(Networks(models), Rows(), num_classes=2, attack=attack, attacked=[(0,), (0, 1)])
    assert predicted is not None and predicted[0].shape == (2 + 4, 2, 2)
    fgsm_one, fgsm_both, pgd_one, pgd_both = predicted[0][2:, :, 1]
    worst_one, worst_both = torch.tensor([0.0, 0.4]), torch.tensor([0.15, 0.6])
    both = (worst_both.sigmoid() + (-2 * worst_both).sigmoid()) / 2
    for one, of_both in ((fgsm_one, fgsm_both), (pgd_one, pgd_both)):
        torch.testing.assert_close(one, worst_one.sigmoid())
        torch.testing.assert_close(of_both, both)
    torch.testing.assert_close(predicted[0][0, :, 1], torch.tensor([0.05, 0.5]).sigmoid())
    first_only = Attack.of([0.0], [255.0], epsilon=25.5, num_steps=5, num_images=1, device=torch.device("cpu"))
    fewer = predict(Networks(models), Rows(), num_classes=2, attack=first_only, attacked=[(0,), (0, 1)])
    assert fewer is not None and bool(fewer[0][2:, 1].isnan().all())
    torch.testing.assert_close(fewer[0][:, 0], predicted[0][:, 0])
