"""The study's command for real: tiny cells are trained by its sweeps, evaluated, and their results kept."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import study
from benchmarks.support import study_evaluate, study_results
from benchmarks.support.study_cells import CELLS
from benchmarks.support.study_evaluations import EVALUATIONS, WITHOUT, Evaluation
from benchmarks.support.study_results import AUROC, METRICS, MILLISECONDS, TOLERANCES
from launchers import sweep_cli, sweep_jobs, train_cli
from launchers.sweep import sweep
from launchers.train import train
from pipeline import zoo
from pipeline.datasets.sidecar import verify
from pipeline.files import parse_json
from pipeline.sparse import select
from tests.support.ranks import without_figures

SUPERPOSED, DENSE = "fashion_mnist/0.1/sup_rigl", "fashion_mnist/1/dense_half"
SHORT = {  # fewer steps, by cell
    SUPERPOSED: {"plan.exploration.length": "3 steps", "plan.exploration.update_interval": "1 steps"}
    | {"plan.refinement.length": "2 steps", "plan.num_refinements": "2"},
    DENSE: {"plan.exploration.length": "2 steps"},
}
NUM_IMAGES = 130  # of each split


class Forked:
    """A run of a sweep as a fork of this process, which has imported everything; stands for ``subprocess.Popen``."""

    def __init__(self, command: Sequence[str], *, stdout: IO[bytes], **_: Any) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            os.setsid()
            for number in (1, 2):
                os.dup2(stdout.fileno(), number)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
            without_figures()
            select._kernels = lambda: None  # numpy computes the same, and need not compile first
            code = train_cli.main(train, command[2:])
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.code = os.waitstatus_to_exitcode(ended[1])
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return self.code


@pytest.fixture
def in_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the study's sweeps run in this process, and their runs in forks of it."""
    import torch._dynamo  # noqa: F401  the optimiser's first step would, in every fork

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(call=lambda command: sweep_cli.main(sweep, command[2:])))
    monkeypatch.setattr(sweep_jobs, "subprocess", SimpleNamespace(**vars(subprocess) | {"Popen": Forked}))
    monkeypatch.setattr(sweep_jobs, "SIGNALS", ())
    monkeypatch.setattr(os, "nice", lambda _: 0)


def write_images(folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (10, 26, 28, 28, 3), dtype=np.uint8)
    for label, number in np.ndindex(10, 26):
        path = folder / ("train" if number < 13 else "val") / str(label) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[label, number]).save(path)


@pytest.mark.usefixtures("in_forks")
def test_two_tiny_cells_are_trained_and_evaluated(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path)
    short = [f"data.train_samples={NUM_IMAGES}", "data.loader=folder", "train.global_batch=65"]
    short += [f"data.{split}={tmp_path / split}" for split in ("train", "val")]
    short += ["evaluation.recalibration_batch=65", "evaluation.recalibration_batches=2", "evaluation.batch=65"]
    short += ["evaluation.held_out_images=20", "evaluation.coefficients=[0.5]"]
    for name, seeds in ((SUPERPOSED, (0,)), (DENSE, (0, 1))):
        settings = (*CELLS[name].settings, *(f"{key}={value}" for key, value in SHORT[name].items()))
        monkeypatch.setitem(CELLS, name, replace(CELLS[name], seeds=seeds, settings=settings))
    evaluations = [Evaluation(CELLS[SUPERPOSED], how) for how in ("rules", "corrupted", "other", "speed")]
    evaluations.append(Evaluation(CELLS[DENSE], "pairs"))
    for each in evaluations:
        monkeypatch.setitem(EVALUATIONS, each.name, each)
    monkeypatch.setattr(study_evaluate, "corrupted_sets", lambda val: [tmp_path / "val", tmp_path / "train"])
    monkeypatch.setattr(study_evaluate, "grey_emoji", lambda data, side: tmp_path / "train")
    arguments = [f"--{key}={tmp_path / key}" for key in ("data", "runs", "results")]
    settings = [text for setting in short for text in ("--set", setting)]
    assert study.main([SUPERPOSED, DENSE, *arguments, *settings, "--jobs", "2"]) == 0
    printed = capfd.readouterr().out
    assert f"{DENSE}: " in printed and " s of CPU time" in printed
    assert study.main([*(each.name for each in evaluations), *arguments, *settings]) == 0
    results = {name: study_results.load(name, tmp_path / "results") for name in (SUPERPOSED, DENSE)}
    results |= {each.name: study_results.load(each.name, tmp_path / "results") for each in evaluations}
    for name, result in results.items():
        assert result is not None and list(result.rows) == ([0, 1] if name == DENSE else [0]), name
        for row in result.rows[0]:
            assert (AUROC in row) is name.endswith("+other")
            for metric in (each for each in METRICS if each in row):  # of so few images errors average out less
                again = result.recomputed(row["name"], metric)
                assert again == pytest.approx(result.values(row["name"], metric), abs=25 * TOLERANCES[metric]), metric
    superposed, rules, pairs = (results[name] for name in (SUPERPOSED, f"{SUPERPOSED}+rules", f"{DENSE}+pairs"))
    assert superposed is not None and rules is not None and pairs is not None
    report = parse_json((tmp_path / "runs" / SUPERPOSED / "seed=0" / "report" / "report.json").read_bytes())
    assert superposed.disagreement() == {0: pytest.approx(report["disagreement"])}
    assert rules.values("superposition-mean", "top1") == superposed.values("superposition-mean", "top1")
    assert {f"superposition-moving{WITHOUT}", "superposition-greedy_soup"} < set(rules.names)
    assert pairs.names == ["ensemble-2"] and pairs.values("ensemble-2", "inference_flops_ratio") == {0: 2}
    corrupted = results[f"{SUPERPOSED}+corrupted"]
    assert corrupted is not None and corrupted.num_parts == 2 and len(corrupted.labels) == 2 * NUM_IMAGES
    speed = results[f"{SUPERPOSED}+speed"]
    assert speed is not None and {"ticket-0", "superposition-mean", "ensemble-3"} < set(speed.names)
    assert all(0 < row[MILLISECONDS] < 1000 for row in speed.rows[0])
    capfd.readouterr()
    assert study.main([evaluations[0].name, *arguments]) == 0
    assert capfd.readouterr().out == f"{SUPERPOSED}+rules: 1 of 1 kept, 0 to do\n"
    assert study.main(["nothing", *arguments]) == 64
    assert "nothing: is not a cell of the study; do: choose one that --list prints" in capfd.readouterr().err
    made = ["zoo", "fashion_mnist_sup", *arguments, *settings, "--zoo", str(tmp_path / "zoo")]
    for _ in range(2):  # the second time the run is there, and its entry is replaced
        assert study.main(made) == 0
    (entry,) = zoo.entries(tmp_path / "zoo").values()
    assert set(entry["networks"]) == {"superposition-mean", "ticket-000", "ticket-001", "ticket-002"}  # type: ignore[call-overload]
    row = next(row for row in report["rows"] if row["name"] == "superposition-mean")
    assert entry["networks"]["superposition-mean"]["nll"] == row["nll"], "the same run again"  # type: ignore[index]
    assert "fashion_mnist_sup" in (tmp_path / "zoo" / "README.md").read_text()
    assert study.main(["zoo", "nothing", *arguments]) == 64
    assert "nothing: is not an entry of the zoo; do: choose from fashion_mnist_s90, " in capfd.readouterr().err


def test_emoji_become_grey_images_on_black(tmp_path: Path) -> None:
    from data_prep.arrays import ArrayImages
    from data_prep.corrupt import BetonImages
    from data_prep.images import ImageOptions
    from data_prep.writer import write_beton

    images = np.full((3, 32, 32, 3), 255, np.uint8)
    images[1, 8:24, 8:24] = [200, 100, 0]  # luma 0.299·200 + 0.587·100 = 118.5
    for folder in ("emoji", "fashion_mnist"):
        (tmp_path / folder).mkdir()
    options = ImageOptions(write_mode="raw")
    write_beton(
        tmp_path / "emoji" / "val.beton",
        ArrayImages(images, np.arange(3)),
        classes=["a", "b", "c"],
        options=options,
        source={},
        num_workers=1,
    )
    path = study_evaluate.grey_emoji(tmp_path, side=28)
    grey = BetonImages.of(path)
    assert len(grey) == 3 and grey[0][0].shape == (28, 28, 3) and not grey[0][0].any()
    assert grey[1][0][14, 14].tolist() == [pytest.approx(255 - 118, abs=1)] * 3
    before = path.stat().st_mtime_ns
    assert study_evaluate.grey_emoji(tmp_path, side=28) == path and path.stat().st_mtime_ns == before
    assert verify(path).sidecar["source"]["kind"] == "grey_emoji"
