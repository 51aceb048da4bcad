"""When an evaluation during training is due, and that it leaves everything as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config.load import load_config
from pipeline.plan import build_plan
from pipeline.training.display import Display
from pipeline.training.evaluation import Evaluation
from tests.training.test_step_log import Tracker


class Draws(nn.Module):
    """A network that draws from every generator, has statistics, and computes logits 0 and ``bias``."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor) -> Tensor:
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        return torch.cat([0 * self.norm(images), 0 * images + self.bias], dim=1)


class Loader:
    num_samples = 4

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        yield torch.arange(4), torch.ones(4, 1), torch.tensor([1, 0, 1, 1])


def evaluation_of(networks: dict[str, Any], *overrides: str) -> tuple[Evaluation, Tracker]:
    config = load_config("fashion_mnist_s90", ["model.num_classes=2", *overrides])
    plan = build_plan(config, steps_per_epoch=468)
    tracker = Tracker()
    log: Any = SimpleNamespace(metrics=tracker.log_metrics, aside=nullcontext(), display=Display(plan, num_classes=2))
    loader: Any = Loader()
    return Evaluation(config, plan, loader, networks, log=log), tracker


def test_random_numbers_statistics_and_modes_stay_as_they_were() -> None:
    trained = Draws(1.0).train()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    evaluation, tracker = evaluation_of(
        {
            "network": (Draws(0.0), trained.state_dict),
            "ema": (Draws(0.0), lambda: {**before, "bias": torch.tensor(-1.0)}),
        }
    )
    states = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002
    assert evaluation.run(467)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1]) and states[2] == random.getstate()  # noqa: NPY002
    assert all(module.training for module in trained.modules())
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.is_grad_enabled()
    # class 1 has probability 0.731 by one network and 0.269 by the other; three of four images are of it
    (found,) = tracker.records.values()
    assert (found["val/top1"], found["val/top5"]) == (0.75, 1.0)
    assert (found["val/ema_top1"], found["val/ema_top5"]) == (0.25, 1.0)
    assert found["val/nll"] == pytest.approx((3 * 0.313262 + 1.313262) / 4, abs=1e-6)
    assert found["val/ema_nll"] == pytest.approx((3 * 1.313262 + 0.313262) / 4, abs=1e-6)
    assert found["time/evaluation_seconds"] > 0


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ("1 epoch", [467, 935, 1403, 1871, 2339, 2807, 3275]),  # seven epochs of 468 steps
        ("3 epochs", [1403, 1871, 2339, 2807, 3275]),  # phases end after epochs 4, 5, 6 and 7
        ("never", []),
    ],
)
def test_one_is_due_at_every_interval_and_at_the_end_of_each_phase(every: str, steps: list[int]) -> None:
    evaluation, _ = evaluation_of({}, f"evaluation.every={every}")
    assert [step for step in range(3276) if evaluation.is_due(step)] == steps
    assert evaluation_of({}, "evaluation.every=1 step")[0].is_due(0)


def test_predictions_that_are_not_finite_are_wrong_and_do_not_end_training(caplog: pytest.LogCaptureFixture) -> None:
    evaluation, tracker = evaluation_of({"network": (Draws(0.0), Draws(torch.inf).state_dict)})
    assert evaluation.run(467)
    (found,) = tracker.records.values()
    assert found["val/top1"] == found["val/top5"] == 0 and found["val/nll"] != found["val/nll"]
    assert "the predictions of 4 images are not finite (network)" in caplog.text
