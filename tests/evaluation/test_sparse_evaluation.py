"""``launchers/evaluate.py --sparse``: the zoo's tickets on real images give what torch gives, with milliseconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import zoo
from pipeline.datasets.beton_format import read_tables
from pipeline.evaluation.predictions import load_predictions
from pipeline.inference import load_ticket
from pipeline.inference.cache import VARIABLE
from tests.end_to_end.small_job import NUM_VAL, make_data
from tests.support.launch import ROOT, command, run
from tests.support.packages import require_fashion_mnist

ENTRY = "fashion_mnist_s90"
NAMES = [f"ticket-{index}" for index in range(4)]
SIDE = 28


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, and report/ of a sparse evaluation."""
    require_fashion_mnist()
    root = tmp_path_factory.mktemp("sparse")
    for name in ("source", "data", "cache"):
        (root / name).mkdir(mode=0o700)
    make_data(root / "source", root / "data")
    given = ["--sparse", "--tickets", ENTRY, "--data", f"{root}/data/val.beton", "--output", f"{root}/report"]
    given += ["--recalibrate", f"{root}/data/train.beton", "evaluation.recalibration_batch=50"]
    given += ["evaluation.recalibration_batches=4", "data.num_workers=1", "tracking.backend=jsonl"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(root / "cache"))
        run(command("python", ROOT / "launchers" / "evaluate.py", given), cwd=root, log=root / "log")
    return root


def test_every_prediction_is_that_of_dense_arithmetic(folder: Path) -> None:
    tables = read_tables(folder / "data" / "val.beton")
    content = np.fromfile(folder / "data" / "val.beton", np.uint8)
    starts = [int(sample["image"]["pointer"]) for sample in tables.samples]
    pictures = [content[start : start + SIDE * SIDE * 3].reshape(SIDE, SIDE, 3) for start in starts]
    files = {name: path for name, path in zoo.tickets(ENTRY).items() if name.startswith("ticket-")}
    dense = {f"ticket-{int(name[-3:])}": load_ticket(path).predict(pictures) for name, path in files.items()}
    in_order = [dense[name] for name in NAMES]
    dense |= {f"ensemble-{n}": torch.stack(in_order[:n]).mean(dim=0) for n in (2, 3, 4)}
    superposed = folder / "report" / "superposition-mean.safetensors"
    dense["superposition-mean"] = load_ticket(superposed).predict(pictures)

    found = load_predictions(folder / "report" / "predictions.npz")
    assert sorted(found.names) == sorted(dense)
    assert len(found.labels) == NUM_VAL
    for name, top1, confidence in zip(found.names, found.top1, found.confidence, strict=True):
        assert np.array_equal(top1, dense[name].argmax(dim=1).numpy()), name
        assert np.abs(confidence - dense[name].amax(dim=1).numpy()).max() < 1e-4, name
        assert float(np.mean(top1 == found.labels)) > 0.85, name


def test_milliseconds_are_in_the_table_the_page_the_figure_and_the_tracker(folder: Path) -> None:
    report = json.loads((folder / "report" / "report.json").read_text())
    rows = {row["name"]: row["more"] for row in report["rows"]}
    for times in (*rows.values(), report["dense_ms"]):
        assert 0 < times["ms_p50"] <= times["ms_p99"]
    assert rows["ensemble-4"]["ms_p50"] > rows["ticket-0"]["ms_p50"]  # four networks, one after the other
    table = (folder / "report" / "table.txt").read_text()
    shown = [line.split() for line in table.split("ms an image")[1].splitlines()]
    p50, p99 = rows["ticket-0"]["ms_p50"], rows["ticket-0"]["ms_p99"]
    assert ["ticket-0", f"{p50:.3f}", f"{p99:.3f}", f"{p50 / report['dense_ms']['ms_p50']:.3f}"] in shown
    page = (folder / "report" / "report.html").read_text()
    assert "<h2>Speed</h2>" in page
    assert "sparse, fp32, on" in page
    for ending in ("png", "pdf"):
        assert (folder / "report" / "figures" / f"milliseconds.{ending}").stat().st_size > 1000
    records = [json.loads(line) for line in (folder / "report" / "metrics.jsonl").read_text().splitlines()]
    tracked = {record["child"]: record["metrics"]["eval/ms_p50"] for record in records if "child" in record}
    assert tracked == {name: times["ms_p50"] for name, times in rows.items()}
