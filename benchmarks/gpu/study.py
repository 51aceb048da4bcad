"""Part ``study``: runs of the study's cells on the device, from one file of images and labels."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.gpu import loop
from benchmarks.gpu.feed import Images
from benchmarks.gpu.loop import Trainer, on_device
from benchmarks.gpu.report import NotRunError, Options, Report
from benchmarks.support import study_pack
from pipeline import models
from pipeline.config.schema import Config, DataConfig, strategy_of
from pipeline.data.augment import PADDING
from pipeline.data.loaders import EvalLoader, TrainLoader
from pipeline.distributed import session
from pipeline.evaluation.predict import Networks, predict
from pipeline.plan import build_plan

# the cells that are trained, in this order; then the same with the next seed
WHAT = ("0.1/rigl_itop", "0.1/static", "1/dense", "0.1/set", "0.1/rigl", "0.1/edst", "0.1/set_itop-10")


class Augmented(Images):
    """Images that are flipped, or padded, cropped and flipped; the same pixels as those of the other sources."""

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], data: DataConfig | None) -> None:
        super().__init__(torch.from_numpy(images), torch.from_numpy(labels))
        self._data = data  # None: as they are

    def batches(
        self, order: NDArray[np.int64], *, batch: int, key: int, resolution: int, reads_ahead: bool = False
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches; see :class:`pipeline.data.loaders.ImageSource`."""
        is_pinned = session.device().type == "cuda"
        for start in range(0, len(order), batch):
            ids = order[start : start + batch]
            images = augmented(self._images.numpy()[ids], ids, key, self._data)
            parts = torch.from_numpy(images).permute(0, 3, 1, 2), self._labels[torch.from_numpy(ids)]
            yield tuple(part.pin_memory() for part in parts) if is_pinned else parts  # type: ignore[misc]


def augmented(
    images: NDArray[np.uint8], ids: NDArray[np.int64], key: int, data: DataConfig | None
) -> NDArray[np.uint8]:
    """Crop and flip images [n, side, side, 3] as :mod:`pipeline.data.augment` does, all at once."""
    if data is None:
        return images
    streams = _mix(np.uint64(key & (2**64 - 1)) ^ _mix(ids.astype(np.uint64) + _GOLDEN))
    if data.augmentation == "pad_crop_flip":
        border = np.array([round(value) for value in data.mean], np.uint8)
        side = images.shape[1]
        padded = np.empty((len(images), side + 2 * PADDING, side + 2 * PADDING, 3), np.uint8)
        padded[:] = border
        padded[:, PADDING:-PADDING, PADDING:-PADDING] = images
        down, right = ((_uniform(streams, draw) * (2 * PADDING + 1)).astype(np.int64) for draw in (1, 2))
        rows, columns = (offset[:, None] + np.arange(side) for offset in (down, right))
        images = padded[np.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    elif data.augmentation != "none":
        raise NotRunError(f"data.augmentation {data.augmentation} needs numba")
    is_flipped = (_uniform(streams, 0) < 0.5) & data.flip
    return np.where(is_flipped[:, None, None, None], images[:, :, ::-1], images)


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def _uniform(streams: NDArray[np.uint64], draw: int) -> NDArray[np.float64]:
    drawn = _mix(streams + np.uint64((draw + 1) * int(_GOLDEN) & (2**64 - 1)))
    return (drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53


def study(given: Options, report: Report) -> None:
    """Train cells of the study, seed by seed, as long as there is time; report accuracies beside those of the CPU."""
    if given.pack is None or not given.pack.is_file():
        raise NotRunError(
            "there is no file of images: bring that of python -m benchmarks.study pack, and name it with --pack"
        )
    pack = study_pack.read(given.pack)
    names = [name for name in (f"fashion_mnist/{what}" for what in WHAT) if name in pack.configurations]
    found: dict[str, list[float]] = {name: [] for name in names}
    ensembles: dict[str, list[float]] = {}
    longest = 0.0
    for seed in range(8):
        for name in names:
            started = time.monotonic()
            if found[names[0]] and not report.has_time(1 - longest / report.seconds):
                break
            config = dataclasses.replace(pack.configurations[name], seed=seed)
            top1, of_ensemble = one_run(given, config, pack)
            found[name].append(top1)
            if of_ensemble is not None:
                ensembles.setdefault(name, []).append(of_ensemble)
            longest = max(longest, time.monotonic() - started)
    for name, values in found.items():
        text = f"top-1 {study_pack.mean(values):.2f} % of {len(values)} seeds" if values else "not run: no time left"
        if name in pack.top1:
            on_cpu = pack.top1[name]
            text += f"; on a CPU {study_pack.mean(on_cpu):.2f} % of {len(on_cpu)}"
            text += f", deviation {100 * statistics.stdev(on_cpu):.2f}" if len(on_cpu) > 1 else ""
        if name in ensembles:
            text += f"; ensemble of its tickets {study_pack.mean(ensembles[name]):.2f} %"
        report.say(name, text, **{f"seed {seed}": value for seed, value in enumerate(values)})
    report.say("longest run of the study", f"{longest:.1f} s", seconds=longest)


def one_run(given: Options, config: Config, pack: study_pack.Pack) -> tuple[float, float | None]:
    """Train one run; return the top-1 of its first ticket, and of the ensemble of its tickets if there are several."""
    data, train, sparsity = config.data, config.train, config.sparsity
    with on_device(given):
        device, num_classes = session.device(), config.model.num_classes
        loader = TrainLoader(
            Augmented(pack.images["train"], pack.labels["train"], data),
            data,
            global_batch=train.global_batch,
            seed=config.seed,
            num_classes=num_classes,
            device=device,
            channels_last=train.channels_last,
        )
        plan = build_plan(config, steps_per_epoch=loader.steps_per_epoch)
        network = models.build(config.model.name, num_classes=num_classes, args=config.model.args, seed=config.seed)
        strategy = strategy_of(sparsity)
        settings = {f.name: getattr(train, f.name) for f in dataclasses.fields(train)} | {"engine": "torch"}
        num_images = settings.pop("global_batch")
        ours = Trainer(
            network,
            num_images=num_images,
            method=strategy,
            density=sparsity.density if strategy.initial_density is None else strategy.initial_density,
            check_every=sparsity.check_every,
            seed=config.seed,
            dense_layers=tuple(sparsity.dense_layers),
            **settings,
        )
        tickets: list[nn.Module] = []
        num_steps = min(plan.num_steps, 20) if given.is_quick else plan.num_steps
        for step, (images, labels) in loader.steps(0, num_steps):
            phase = plan.at(step)
            ours.step(images, labels, phase.update_at(step), lr=phase.lr(step))
            if phase.closes_with_ticket(step) or (step == num_steps - 1 and not tickets):
                tickets.append(copy.deepcopy(ours.engine.model).eval())
        validation = EvalLoader(
            Augmented(pack.images["val"], pack.labels["val"], None),
            data,
            batch=config.evaluation.batch,
            num_images=500 if given.is_quick else None,
            device=device,
            channels_last=train.channels_last,
        )
        predicted = predict(Networks(tickets), validation, num_classes=int(num_classes or 0))
        loop.synchronize()
    assert predicted is not None
    probabilities, labels = predicted
    top1 = (probabilities.argmax(dim=2) == labels).double().mean(dim=1).tolist()
    ensemble = (probabilities.mean(dim=0).argmax(dim=1) == labels).double().mean().item()
    return top1[0], ensemble if len(tickets) > 1 else None
