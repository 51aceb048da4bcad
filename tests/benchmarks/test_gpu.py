"""``python -m benchmarks.gpu``: all of its parts run on a CPU too, and a wrong result is an error."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu import __main__ as acceptance
from benchmarks.gpu import study as gpu_study
from benchmarks.gpu.report import WRONG, Line, NotRunError, Options, Report
from benchmarks.gpu.study import augmented
from benchmarks.study import RESULTS
from benchmarks.support import study_pack
from benchmarks.support.study_cells import CELLS, data_settings
from pipeline.config.load import load_config
from pipeline.config.schema import DataConfig
from pipeline.data.augment import place_of, sample_stream, training_augmentation, uniform
from pipeline.errors import DataError

ROOT = Path(__file__).parents[2]
OPTIONS = Options(device="cpu", is_quick=True, threads=1, model="cifar_resnet8", pack=None, study_seconds=0)
# Packages of the environment that a machine with torch, torchvision and numpy lacks.
ABSENT = "ffcv deepspeed omegaconf mlflow numba yaml cv2 timm fsspec safetensors scipy matplotlib llvmlite tqdm psutil"


def command(*arguments: str) -> list[str]:
    """Return the command, in a Python in which the packages of ``ABSENT`` cannot be imported."""
    code = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({ABSENT!r}.split()))\n"
        f"sys.argv[1:] = {list(arguments)!r}\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__', alter_sys=True)"
    )
    return [sys.executable, "-c", code]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run all parts but DeepSpeed's, which is installed here."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = [part for part in acceptance.SECONDS if part != "deepspeed"]
    run = subprocess.run(
        command("--device", "cpu", "--quick", "--json", str(file), "--only", *parts),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return run, json.loads(file.read_text()) if file.exists() else {}


Done = tuple[subprocess.CompletedProcess[str], dict[str, Any]]


def test_all_parts_run_with_torch_torchvision_and_numpy_alone(done: Done) -> None:
    run, found = done
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert found["wrong"] == []
    assert {name: part["status"] for name, part in found["parts"].items() if part["status"] != "done"} == {
        "study": "not run: --study SECONDS asks for it"
    }


def test_every_part_gives_the_results_that_it_is_for(done: Done) -> None:
    run, found = done
    lines = {line["name"]: line for part in found["parts"].values() for line in part["lines"]}
    right = {name for name, line in lines.items() if line["verdict"] == "right"}
    assert right == {
        *("masks", "packed, whole gradients, ddp", "a rank is killed", "pixels", "SIGKILL and resume", "attacks"),
        *("statistics of an evaluation", "probabilities of an evaluation", "top-1 of an evaluation"),
        *("compiled gradient", "compiled numbers", "compiled twice", "ViT, block: outputs"),
        *("a NaN in a step, sgd", "a NaN in a step, adamw"),
    }
    limits = {name: line["must"] for name, line in lines.items() if line["verdict"] in ("met", "missed")}
    assert limits == {
        "sparse / dense, 8": "≤ 1.02",
        "images/s dense / plain, 8": "≥ 0.9",
        **{f"update {name}": "≤ 20" for name in ("rigl layer", "rigl global", "set layer")},
        "images/s of the feed alone": "≥ 8000",
        "step with / without feed, 8": "≤ 1.01",
        "snapshot of a checkpoint": "≤ 300",
    }
    assert lines["masks"]["numbers"] == {"num_masks": 18 * 3 * 10 - 3}  # with blocks the first of ten layers is dense
    assert all(line["name"] in run.stdout for line in lines.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_a_message(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--json", str(file)]
    run = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1 and not file.exists()
    assert "no CUDA device found; --device cpu --quick tests that the code runs" in run.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_of_the_gpu_are_those_of_the_cpu(tmp_path: Path) -> None:
    arguments = ["-m", "benchmarks.gpu", "--only", "masks", "--json", str(tmp_path / "gpu.json")]
    run = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "on cpu and cuda  must be equal: right" in run.stdout


# -- what becomes of a part that does not go well


def fails(_: Options, report: Report) -> None:
    report.say("before", "a line")
    raise ValueError("no such thing")


def crashes(_: Options, report: Report) -> None:
    import os

    os._exit(7)


def hangs(_: Options, report: Report) -> None:
    import time

    time.sleep(60)


def lacks(_: Options, report: Report) -> None:
    raise NotRunError("a package is missing")


@pytest.mark.parametrize(
    ("work", "status"),
    [
        (fails, "failed: ValueError: no such thing"),
        (crashes, "failed: its process ended with 7"),
        (hangs, "not run to its end: stopped after 1 s"),
        (lacks, "not run: a package is missing"),
    ],
)
def test_a_part_that_does_not_end_well_has_a_status_and_keeps_its_lines(work: Any, status: str) -> None:
    lines: list[Line] = []
    results, found = acceptance.in_a_fork(work, OPTIONS, 1.0 if work is hangs else 60.0, print_line=lines.append)
    assert (results, found) == ([], status)
    assert [line.name for line in lines] == (["before"] if work is fails else [])


def test_a_wrong_result_and_a_missed_bar_are_told_apart() -> None:
    lines: list[Line] = []
    report = Report(lines.append, 1.0, is_quick=True)
    report.at_most("slow", 1.5, 1.02)
    report.check("masks", False, "12 masks", "equal")
    assert [line.verdict for line in lines] == ["missed", WRONG]
    assert str(lines[0]) == f"{'slow':30} 1.5  must be ≤ 1.02: missed"


@pytest.mark.parametrize(
    ("versions", "lacking"),
    [
        ({"torch": "2.11.0+cu130", "torchvision": "0.26.0", "numpy": "2.5.5"}, None),
        ({"torch": "2.9.1", "torchvision": "", "numpy": "2.5.5"}, "wheels torch>=2.11 torchvision; here: "),
    ],
)
def test_it_says_which_wheels_to_bring(
    versions: dict[str, str], lacking: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "installed_version", lambda name: versions.get(name) or "not installed")
    found = acceptance.wheels()
    assert found is None if lacking is None else lacking in str(found)


# -- the study's file


@pytest.mark.parametrize("augmentation", ["none", "pad_crop_flip"])
def test_images_of_the_study_have_the_pixels_of_the_other_sources(augmentation: str) -> None:
    data = DataConfig(train="t", val="v", train_resolution=12, augmentation=augmentation, mean=[210.3, 199.0, 190.0])
    images = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    ids, key = np.arange(100, 140), 12345678901234567890
    settings = training_augmentation(data)
    place, expected = place_of(settings), np.empty_like(images)
    for image, sample, out in zip(images, ids, expected, strict=True):
        stream = np.uint64(sample_stream(np.uint64(key), int(sample)))
        is_flipped = settings.flip and uniform(stream, 0) < 0.5
        place(image, (0, 0), (12, 12), settings.box(12, 12, stream), stream, is_flipped, out)
    assert np.array_equal(augmented(images, ids, key, data), expected)
    assert not np.array_equal(expected, images)


def test_a_file_that_is_not_of_the_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"not a file of numpy")
    with pytest.raises(DataError, match=r"is not a file of python -m benchmarks.study pack"):
        study_pack.read(tmp_path / "x.npz")


def test_the_study_trains_from_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (256, 28, 28, 1), np.uint8).repeat(3, axis=3)
    labels = np.arange(256) % 10
    monkeypatch.setattr(study_pack, "_read", lambda config, split: (grey, labels))
    file = tmp_path / "study.npz"
    said = study_pack.write(file, data=tmp_path, results=RESULTS)
    assert said.startswith(f"{file}: 512 images, 23 cells, 0.")
    assert file.stat().st_size < 256 * 28 * 28 * 2 + 100_000  # one channel of grey images
    pack, cell = study_pack.read(file), CELLS["fashion_mnist/0.1/edst"]
    assert np.array_equal(pack.images["val"], grey) and np.array_equal(pack.labels["train"], labels)
    assert pack.configurations[cell.name] == load_config(cell.config, [*data_settings(cell, tmp_path), *cell.settings])
    assert len(pack.top1[cell.name]) == len(cell.seeds) and min(pack.top1[cell.name]) > 0.8

    lines: list[Line] = []
    options = replace(OPTIONS, pack=file, study_seconds=1)
    _, status = acceptance.in_a_fork(gpu_study.study, options, 120.0, seconds=1.0, print_line=lines.append)
    assert not status
    first = lines[0]
    assert first.name == "fashion_mnist/0.1/rigl_itop" and "top-1" in first.text and "; on a CPU 87." in first.text
    assert [line.name for line in lines] == [f"fashion_mnist/{what}" for what in gpu_study.WHAT] + [
        "longest run of the study"
    ]
