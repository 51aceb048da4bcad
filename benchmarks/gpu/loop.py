"""The training step of launchers/train.py, plain torch at its best beside it, and how both are timed."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu.report import Options, Report
from pipeline import models
from pipeline.config.schema import TrainConfig
from pipeline.distributed import group, session
from pipeline.distributed.session import Session
from pipeline.engine.build import build_engine
from pipeline.sparse.masks import mask_digest
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS, Strategy
from pipeline.sparse.timing import DueUpdate

DENSITY = 0.1
DROP_FRACTION = 0.3
NUM_STEPS = 20  # at least so many between two synchronisations, so that a wait in a step is seen
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # by ``train.precision``
# of dense bf16 tensor cores, in 10^12 floating-point operations per second, as NVIDIA's data sheets give it
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
    "A10G": 70,
    "L4": 121,
}


@contextmanager
def on_device(given: Options, **settings: Any) -> Iterator[Session]:
    """Join a session of this process on the device of the acceptance."""
    with group.join(on=given.device, threads_per_rank=given.threads, timeout_seconds=60, **settings) as ranks:
        yield ranks


class Trainer:
    """The parts of a run that a device has to do with, and the loop's step.

    Args:
        model: the network.
        num_images: images per step, over all ranks.
        method: name of the sparse method, or a strategy; ``dense`` for none.
        density: share of active weights at first.
        check_every: steps between two checks of masks and weights.
        seed: of masks and random growth.
        dense_layers: weights that stay dense.
        settings: further keys of the section ``train``.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        num_images: int,
        method: str | Strategy = "rigl_itop",
        density: float = DENSITY,
        check_every: int = 10,
        seed: int = 0,
        dense_layers: tuple[str, ...] = (),
        **settings: Any,
    ) -> None:
        train = {"engine": "torch", "global_batch": num_images, "weight_decay": 1e-4, **settings}
        self.engine = build_engine(model, TrainConfig(**train))
        strategy = METHODS[method] if isinstance(method, str) else method
        self.sparsifier = Sparsifier(
            self.engine.model,
            self.engine.optimizer,
            strategy,
            density=1.0 if method == "dense" else density,
            seed=seed,
            dense_layers=dense_layers,
            fragments=self.engine.fragments,
            on_masks=self.engine.use_masks,
            shadows=[] if self.engine.average is None else [self.engine.average.module],
            check_every=check_every,
        )
        self._ranks = Session()
        self._step = 0

    def backward(
        self, images: Tensor, labels: Tensor, update: DueUpdate | float | None = None, lr: float = 0.05
    ) -> tuple[Tensor, Tensor]:
        """Take the first half of a step; return loss and gradient norm."""
        dense = self.sparsifier.needs_dense_gradient(update)
        loss, _, norm = self.engine.backward(images, labels, lr=lr, dense=dense)
        return loss, norm

    def finish(self, loss: Tensor, norm: Tensor, update: DueUpdate | float | None = None) -> None:
        """Take the second half: agreement, optimiser, and the topology update if one is due."""
        self._ranks.agree_to_go_on(loss, norm, self._step, at_once=update is not None)
        if self.sparsifier.before_step(update, is_finite=True, is_masked=self.engine.masks_gradients):
            self.engine.step(self._ranks.is_bad)
        else:
            self.engine.skip_step()
        self.sparsifier.after_step()
        self._step += 1

    def step(self, images: Tensor, labels: Tensor, update: DueUpdate | float | None = None, lr: float = 0.05) -> Tensor:
        """Take one step; return the loss."""
        loss, norm = self.backward(images, labels, update, lr)
        self.finish(loss, norm, update)
        return loss

    def digests(self) -> dict[str, str]:
        """Return digests of all that training changes: weights, buffers, optimiser state and masks."""
        state = dict(self.engine.model.state_dict())
        for name, parameter in self.engine.model.named_parameters():
            state |= {f"{name}/{key}": value for key, value in self.engine.state_of(parameter).items()}
        return {
            "state": digest_of(state),
            "masks": mask_digest(self.sparsifier.masks),
            "history": self.sparsifier.history_digest,
        }


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return a digest of all tensors and their names."""
    each = {name: session.digest(tensor) for name, tensor in tensors.items()}
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()


def plain_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    """Return one step of plain torch: fused SGD, channels-last, bf16 on a GPU. The session sets cuDNN's benchmark."""
    model.to(images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=images.is_cuda):
            loss = cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def network(given: Options, *, seed: int = 0) -> nn.Module:
    """Build the network of the parts that measure time."""
    return models.build(given.model, seed=seed)


def small_network(seed: int = 0) -> nn.Module:
    """Build the network of the parts that look for equal bits."""
    return models.build("cifar_resnet8", num_classes=10, args={"width": 16}, seed=seed)


def tiny_network() -> nn.Sequential:
    """Make a network that is compiled quickly."""
    torch.manual_seed(5)
    layers = [nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def precision(given: Options) -> str:
    """Return ``train.precision`` of the parts that measure time."""
    return "bf16" if given.device == "cuda" else "fp32"  # a CPU would emulate bf16


def side(given: Options) -> int:
    """Return the side of the images in pixels."""
    return 32 if given.is_quick else 224 if given.device == "cuda" else 64


def batch_sizes(given: Options) -> tuple[int, ...]:
    """Return the numbers of images per step that are measured."""
    return (8,) if given.is_quick else (256, 64) if given.device == "cuda" else (16,)


def batch(
    given: Options, num_images: int, pixels: int, num_classes: int = 1000, *, seed: int = 0, dtype: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """Return normalised images and labels on the device; the loader makes images of ``bf16`` under autocast."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(num_images, 3, pixels, pixels, generator=generator).to(DTYPES[dtype])
    labels = torch.randint(0, num_classes, (num_images,), generator=generator)
    return images.to(given.device, memory_format=torch.channels_last), labels.to(given.device)


def synchronize() -> None:
    """Wait for the device, if it is a GPU."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def seconds_of(leg: Callable[[], object]) -> float:
    """Return the wall time of a leg between two synchronisations."""
    synchronize()
    started = time.perf_counter()
    leg()
    synchronize()
    return time.perf_counter() - started


def interleaved(legs: Mapping[str, Callable[[], object]], report: Report, *, until: float) -> dict[str, list[float]]:
    """Time 20 calls of each leg between two synchronisations, one leg after the other, in rounds.

    The leg that is first changes from round to round. The first round is not counted. With ``--quick``
    there are two calls in place of 20.

    Args:
        legs: functions that take one step, by name.
        report: that of the part; the rounds end when ``until`` of its time has passed, but not before
            there are two that count.
        until: share of the part's time.

    Returns:
        For each leg its times per step in milliseconds, one per round.
    """
    times: dict[str, list[float]] = {name: [] for name in legs}
    names, num_steps = list(legs), 2 if report.is_quick else NUM_STEPS
    for index in range(100):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            leg, few = legs[name], num_steps if index else 2
            seconds = seconds_of(lambda leg=leg, few=few: [leg() for _ in range(few)])  # type: ignore[misc]
            if index:
                times[name].append(1000 * seconds / few)
        if index >= 2 and not report.has_time(until):
            break
    return times


def ratio(numerator: list[float], denominator: list[float]) -> tuple[float, str]:
    """Return the median over rounds of the ratio of two legs, and it with its quartiles and both times as text."""
    ratios = [a / b for a, b in zip(numerator, denominator, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    median = statistics.median(ratios)
    times = f"{statistics.median(numerator):.2f} / {statistics.median(denominator):.2f} ms, {len(ratios)} rounds"
    return median, f"{median:.3f} [{low:.3f}–{high:.3f}] ({times})"


def peak_tflops() -> float | None:
    """Return the peak bf16 rate of the current GPU; None: it is not in the table."""
    name = torch.cuda.get_device_name()
    return next((peak for known, peak in PEAK_TFLOPS.items() if all(word in name for word in known.split())), None)
