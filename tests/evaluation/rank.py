"""One rank of a group of any size, started by the tests.

It recalibrates, averages, predicts and evaluates tickets on a set of 22 images::

    python rank.py RANK WORLD_SIZE FOLDER

FOLDER/tickets holds the tickets; the results of rank 0 go to FOLDER/<WORLD_SIZE>.*
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.command_line import leave
from pipeline.config.schema import EvaluationConfig
from pipeline.errors import NumericsError
from pipeline.evaluation.attacks import Attack
from pipeline.evaluation.batchnorm import average_buffers, recalibrate
from pipeline.evaluation.members import Setup
from pipeline.evaluation.predict import Networks, predict
from pipeline.evaluation.report import FurtherSets, Report, evaluate_tickets
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.score import score
from pipeline.tickets.store import TicketStore

NUM_SAMPLES, NUM_CLASSES = 22, 3


class Images:
    """The two loaders in memory.

    Rank r evaluates samples r, r + W, …, in reverse order; micro-batch i belongs to rank i mod W.
    """

    num_samples = NUM_SAMPLES

    def __init__(self, rank: int, world_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(NUM_SAMPLES, 2, 4, 4, generator=generator) * 3 + 1
        self.labels = torch.randint(NUM_CLASSES, (NUM_SAMPLES,), generator=generator)
        self.rank, self.world_size = rank, world_size

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        ids = torch.arange(self.rank, NUM_SAMPLES, self.world_size).flip(0)
        for part in torch.split(ids, 4):
            yield part, self.images[part], self.labels[part]

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterator[Tensor]:
        order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(seed))
        parts = torch.split(self.images[order], batch)[:num_batches]
        yield from parts[self.rank :: self.world_size]


def build_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, NUM_CLASSES),
    )


def further_sets(data: Images) -> FurtherSets:
    """Return everything that a report can have.

    One corruption at two severities, a set of other labels, both attacks, flip and temperature.
    """
    return FurtherSets(
        corrupted=[("blur", severity, data) for severity in (1, 3)],
        other_classes=[("other", data)],
        attack=Attack.of([0.0, 0.0], [255.0, 127.5], epsilon=25.5, num_steps=3, device=torch.device("cpu")),
        flip=True,
        fits_temperature=True,
    )


def evaluate(
    folder: Path,
    data: Images,
    settings: EvaluationConfig,
    *,
    held_out: Images | None = None,
    further: FurtherSets | None = None,
) -> Report | None:
    setup = Setup(
        settings, lambda ticket: build_model(), lambda provenance, masks: 0.5, train_loader=data, held_out=held_out
    )
    runs = [TicketRun(TicketStore(folder / "tickets").list())]
    return evaluate_tickets(runs, setup, eval_loader=data, further=further or FurtherSets())


def main(rank: int, world_size: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous-{world_size}", rank=rank, world_size=world_size
    )
    data = Images(rank, world_size)

    model = build_model()
    num_images = recalibrate(
        model, data.micro_batches(batch=4, num_batches=6, seed=1)
    )  # the last micro-batch has two images
    recalibrated = {
        name: tensor.clone() for name, tensor in model.state_dict().items() if "running" in name or "tracked" in name
    }

    model[1].running_mean.fill_(float(rank))  # as in training: every rank has statistics of its own
    averaged = average_buffers(model)
    assert model[1].running_mean[0] == rank

    models = [build_model(seed).train() for seed in (0, 1)]
    predicted = predict(Networks(models), data, num_classes=NUM_CLASSES)
    assert (predicted is None) == (rank != 0) and models[0].training

    scores = score(Networks(models), data, num_classes=NUM_CLASSES)
    assert models[0].training

    broken = Images(rank, world_size)
    broken.images[world_size - 1] = torch.nan  # the last rank's
    try:
        predict(Networks(models), broken, num_classes=NUM_CLASSES)
        raise AssertionError("NaN counted as a prediction")
    except NumericsError as error:
        assert error.is_reported_elsewhere == (rank != world_size - 1)

    report = evaluate(
        folder, data, EvaluationConfig(recalibration_batch=4, recalibration_batches=5), further=further_sets(data)
    )
    settings = EvaluationConfig(
        recalibration_batch=4, recalibration_batches=5, superposition="interpolation", coefficients=[0.2, 0.5]
    )
    chosen = evaluate(folder, data, settings, held_out=data)
    if predicted is not None and report is not None and chosen is not None:
        save_file(
            recalibrated | {"probabilities": predicted[0], "labels": predicted[1]}, folder / f"{world_size}.safetensors"
        )
        mean = averaged["1.running_mean"][0].item()
        reports = {
            name: asdict(replace(each, superpositions={}, predictions=None))
            for name, each in (("report", report), ("chosen", chosen))
        }
        content = {
            "num_images": num_images,
            "mean_of_ranks": mean,
            "scores": [asdict(each) for each in scores],
            **reports,
        }
        (folder / f"{world_size}.json").write_text(json.dumps(content))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    leave(0)
