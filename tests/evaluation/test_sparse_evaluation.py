"""A report by sparse inference: the zoo's tickets on real images give what torch gives, with milliseconds."""

from __future__ import annotations

import gzip
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep import doctor
from pipeline import models, zoo
from pipeline.config.schema import EvaluationConfig
from pipeline.evaluation import speed_figure
from pipeline.evaluation.figure import png
from pipeline.evaluation.members import Setup
from pipeline.evaluation.page import page
from pipeline.evaluation.report import Report, evaluate_tickets
from pipeline.evaluation.runs import TicketRun
from pipeline.evaluation.sparse import SparseInference
from pipeline.evaluation.table import format_table
from pipeline.inference.cache import VARIABLE
from pipeline.tickets import Ticket, TicketStore
from tests.support.packages import require_fashion_mnist

ENTRY, SIDE, NUM_IMAGES = "fashion_mnist_s90", 28, 1000
ROWS = [*(f"ticket-{index}" for index in range(4)), "superposition-mean", *(f"ensemble-{n}" for n in (2, 3, 4))]


class Images:
    """The first test images, and training images to recalibrate BatchNorm with, prepared as the tickets say."""

    num_samples = NUM_IMAGES

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))

    def read(self, part: str, count: int) -> Tensor:
        content = gzip.decompress((doctor.FASHION_MNIST / f"{part}-images-idx3-ubyte.gz").read_bytes())
        pixels = np.frombuffer(content, np.uint8, count * SIDE * SIDE, 16).reshape(count, 1, SIDE, SIDE)
        return (torch.tensor(pixels).float().expand(-1, 3, -1, -1) - self.mean) / self.std

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        content = gzip.decompress((doctor.FASHION_MNIST / "t10k-labels-idx1-ubyte.gz").read_bytes())
        labels = torch.tensor(np.frombuffer(content, np.uint8, NUM_IMAGES, 8).astype(np.int64))
        images, ids = self.read("t10k", NUM_IMAGES), torch.arange(NUM_IMAGES)
        yield from zip(ids.split(300), images.split(300), labels.split(300), strict=True)

    def micro_batches(self, *, batch: int, num_batches: int, seed: int) -> Iterator[Tensor]:
        return iter(self.read("train", batch * num_batches).split(batch))


def build(ticket: Ticket) -> torch.nn.Module:
    of = ticket.provenance
    return models.build(of.model, num_classes=of.num_classes, args=of.model_args)


@pytest.fixture(scope="module")
def run() -> TicketRun:
    return TicketRun(TicketStore(zoo.find(ENTRY) / "tickets").list())


@pytest.fixture(scope="module")
def reports(run: TicketRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Report]:
    """The report of dense arithmetic, and that of sparse inference."""
    require_fashion_mnist()
    prepared = run.refs[0].provenance.preprocessing
    data, found = Images(prepared["mean"], prepared["std"]), []
    settings = EvaluationConfig(recalibration_batch=50, recalibration_batches=4)
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        cache.chmod(0o700)
        patch.setenv(VARIABLE, str(cache))
        for sparse in (None, SparseInference(threads=2, side=SIDE)):
            setup = Setup(settings, build, lambda *_: 0.1, train_loader=data, sparse=sparse)
            report = evaluate_tickets([run], setup, eval_loader=data)
            assert report is not None
            found.append(report)
    return found[0], found[1]


def test_every_prediction_is_that_of_dense_arithmetic(reports: tuple[Report, Report]) -> None:
    dense, sparse = (report.predictions for report in reports)
    assert dense is not None
    assert sparse is not None
    assert dense.names == sparse.names == tuple(ROWS)
    assert np.array_equal(dense.top1, sparse.top1)
    assert np.abs(dense.confidence - sparse.confidence).max() < 1e-4
    assert [row.top1 for row in reports[0].rows] == [row.top1 for row in reports[1].rows]
    assert min(row.top1 for row in reports[1].rows) > 0.88


def test_milliseconds_are_in_the_table_the_page_the_figure_and_the_metrics(
    reports: tuple[Report, Report], run: TicketRun
) -> None:
    dense, report = reports
    for row in report.rows:
        assert 0 < row.numbers["ms_p50"] <= row.numbers["ms_p99"]
    of = {row.name: row.more["ms_p50"] for row in report.rows}
    assert of["ensemble-4"] > of["ticket-0"]  # four networks, one after the other
    p50, p99, by_torch = of["ticket-0"], report.rows[0].more["ms_p99"], report.dense_ms["ms_p50"]
    shown = [line.split() for line in format_table(report).split("ms an image", 1)[1].splitlines()]
    assert ["ticket-0", f"{p50:.3f}", f"{p99:.3f}", f"{p50 / by_torch:.3f}"] in shown
    assert max(map(len, format_table(report).splitlines())) <= 100
    (drawn,) = speed_figure.figures(report).values()
    pictures = dict.fromkeys(("overview", "milliseconds"), ("", b""))
    assert png(drawn[1]).startswith(b"\x89PNG")
    assert "<h2>Speed</h2>" in page(report, [run], pictures, settings={})
    assert "ms_p50" not in dense.rows[0].numbers
    assert "ms an image" not in format_table(dense)
    assert speed_figure.figures(dense) == {}
