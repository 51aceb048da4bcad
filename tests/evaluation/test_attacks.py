"""Attacks on networks whose worst image is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pipeline.data.order import evenly_spread
from pipeline.evaluation.attacks import Attack, _noise

WEIGHTS = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1)


def probabilities(images: Tensor) -> Tensor:
    """Class 1 has log-odds Σ weight·pixel, over three channels of one pixel."""
    odds = (WEIGHTS * images).sum(dim=(1, 2, 3))
    return torch.stack([torch.zeros_like(odds), odds], dim=1).softmax(dim=1)


def attack(epsilon: float = 25.5, num_steps: int = 10) -> Attack:
    """Make an attack on channels of mean 51 and deviations 255, 127.5 and 51.

    A step of 25.5 is 0.1, 0.2 and 0.5; black is −0.2, −0.4 and −1; white is 0.8, 1.6 and 4.
    """
    return Attack.of([51.0] * 3, [255.0, 127.5, 51.0], epsilon=epsilon, num_steps=num_steps, device=torch.device("cpu"))


def test_fgsm_steps_along_the_sign_of_the_gradient() -> None:
    images = torch.zeros(2, 3, 1, 1)
    # Against class 1: down where the weight is positive; against class 0 the other way.
    moved = attack().fgsm(probabilities, images, torch.tensor([1, 0]))
    torch.testing.assert_close(moved.view(2, 3), torch.tensor([[-0.1, 0.2, -0.5], [0.1, -0.2, 0.5]]))
    assert not moved.requires_grad


def test_pixels_stay_between_black_and_white() -> None:
    black = torch.tensor([-0.2, -0.4, -1.0]).view(1, 3, 1, 1)
    moved = attack().fgsm(probabilities, black, torch.tensor([1]))
    torch.testing.assert_close(moved.view(3), torch.tensor([-0.2, -0.2, -1.0]))  # only the second channel has room


@pytest.mark.parametrize("num_steps", [1, 10])
def test_pgd_stays_within_epsilon_and_reaches_the_worst_corner(num_steps: int) -> None:
    images = torch.zeros(50, 3, 1, 1)
    moved = attack(num_steps=num_steps).pgd(probabilities, images, torch.ones(50, dtype=torch.long), torch.arange(50))
    assert (moved.abs() <= attack().epsilon + 1e-6).all()
    if num_steps == 10:  # 25 steps of 0.1·epsilon: from anywhere to the corner
        torch.testing.assert_close(moved, torch.tensor([-0.1, 0.2, -0.5]).view(1, 3, 1, 1).expand(50, 3, 1, 1))


@pytest.mark.parametrize(("num_images", "num_samples"), [(4, 10), (3, 7), (1, 5), (9, 5), (None, 5)])
def test_some_images_are_attacked_evenly_spread(num_images: int | None, num_samples: int) -> None:
    some = Attack.of([51.0] * 3, [51.0] * 3, epsilon=8, num_steps=1, num_images=num_images, device=torch.device("cpu"))
    chosen = some.chosen(torch.arange(num_samples), num_samples)
    assert chosen.nonzero().flatten().tolist() == evenly_spread(num_samples, num_images).tolist()


def test_an_image_is_attacked_alike_in_every_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    images, labels, ids = (
        torch.randn(6, 3, 1, 1, generator=generator),
        torch.tensor([0, 1, 0, 1, 0, 1]),
        torch.arange(6),
    )
    together = attack(num_steps=2).pgd(probabilities, images, labels, ids)
    alone = [
        attack(num_steps=2).pgd(probabilities, images[i : i + 1], labels[i : i + 1], ids[i : i + 1]) for i in (5, 2)
    ]
    torch.testing.assert_close(torch.cat(alone), together[[5, 2]], rtol=0, atol=0)


def test_pgd_starts_anywhere_within_epsilon_by_sample_id() -> None:
    noise = _noise(torch.zeros(4, 3, 50, 50), torch.tensor([7, 8, 9, 7]))
    assert torch.equal(noise[0], noise[3]) and not torch.equal(noise[0], noise[1])
    assert -1 <= float(noise.min()) < -0.999 and 0.999 < float(noise.max()) < 1 and abs(float(noise.mean())) < 0.02


def test_a_network_that_is_sure_beyond_float32_is_attacked_without_nan() -> None:
    def sure(images: Tensor) -> Tensor:
        odds = 1000 * images.sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(odds), odds], dim=1).softmax(dim=1)

    assert torch.isfinite(attack().fgsm(sure, torch.ones(1, 3, 1, 1), torch.tensor([1]))).all()
