"""R1, what the checks between updates cost: a ResNet-50 training step with them against one without. ``python -m benchmarks.checks``"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.bars import Bounds, Figure, Options, Report, bar, median_ms, milliseconds, options
from benchmarks.workload import DENSITY
from pipeline import models
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

CHECK_EVERY = 10  # steps, the Sparsifier's default
BOUNDS = Bounds("≤ 1.03", "1.01", "1")


class Training:
    """Steps on small images (64 px, batch 16): the cheaper the step, the more the checks weigh."""

    def __init__(self, model: str, given: Options) -> None:
        size, num_images = (32, 4) if given.is_quick else (64, 16)
        self.model = models.build(model).to(given.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4, fused=True)
        self.sparsifier = Sparsifier(self.model, self.optimizer, METHODS["rigl"], density=DENSITY, seed=0, check_every=0)
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(num_images, 3, size, size, generator=generator).to(given.device)
        self.labels = torch.randint(0, 1000, (num_images,), generator=generator).to(given.device)
        self.loss = nn.CrossEntropyLoss()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.model(self.images), self.labels).backward()
        self.sparsifier.before_step()
        self.optimizer.step()
        self.sparsifier.after_step()

    def checked_and_unchecked_steps(self) -> tuple[float, float]:
        """ms of CHECK_EVERY steps of which the last is checked, and of as many without a check, in turn."""
        checked = unchecked = 0.0
        for index in range(CHECK_EVERY):
            for is_checked in (True, False) if index % 2 else (False, True):
                self.sparsifier.check_every = 1 if is_checked and index == CHECK_EVERY - 1 else 0
                ms = milliseconds(self.step)
                checked, unchecked = (checked + ms, unchecked) if is_checked else (checked, unchecked + ms)
        return checked, unchecked


def measure(model: str, given: Options, report: Report) -> None:
    """R1, and the time of one check."""
    training = Training(model, given)
    training.checked_and_unchecked_steps()
    r1 = bar("R1", [[training.checked_and_unchecked_steps() for _ in range(given.rounds)] for _ in range(given.runs)], BOUNDS)
    report.add(r1)
    check_ms = median_ms(training.sparsifier.check, rounds=3 * given.rounds)
    step_ms = r1.denominator_ms / CHECK_EVERY
    share = 1 + check_ms / CHECK_EVERY / step_ms
    text = f"{check_ms:.1f} ms, once in {CHECK_EVERY} steps of {step_ms:.0f} ms: {share:.4f} of a step without"
    report.add(Figure("one check", text, {"check_ms": check_ms, "step_ms": step_ms, "ratio": share}))


def main() -> None:
    given = options(__doc__, ("R1",), models=("resnet50",), quick_model="cifar_resnet20")
    report = Report()
    measure(given.models[0], given, report)
    report.write(given.json)


if __name__ == "__main__":
    main()
