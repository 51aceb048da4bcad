"""``python -m data_prep`` as a user runs it: real processes, one line per error, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from pipeline.datasets.sidecar import sidecar_path
from tests.support.launch import can_mount

WITH_LITTLE_SHARED_MEMORY = [
    "unshare",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"',
    "sh",
]


def command(*arguments: str | Path, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    line = [*prefix, sys.executable, "-m", "data_prep", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def make_folders(root: Path, classes: list[str]) -> list[str]:
    """Write two images per class; returns the arguments that name the folders."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(2):
                Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8)).save(
                    root / split / name / f"{index}.jpg"
                )
    return ["--train", f"{root}/train", "--val", f"{root}/val", "--output", f"{root}/out"]


def test_image_folder_then_verify_stage_and_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = make_folders(tmp_path, ["ant", "bee"])
    prefix = WITH_LITTLE_SHARED_MEMORY if can_mount() else ()  # F26
    written = command("image-folder", *folders, "--write-mode", "jpg", "--workers", "1", prefix=prefix)
    assert (written.returncode, len(written.stdout.splitlines())) == (0, 2), written.stderr
    assert "train.beton: 4 samples, 2 classes, jpg images of up to 40×30 pixels, digest " in written.stdout
    train = tmp_path / "out" / "train.beton"
    assert command("verify", "--deep", "--classes", "2", train, tmp_path / "out" / "val.beton").returncode == 0

    copies = tmp_path / "local"
    assert main(["stage", str(train), str(train.with_name("val.beton")), "--output", str(copies)]) == 0
    assert main(["info", "--json", str(copies / "train.beton")]) == 0
    *staged, described = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in staged] == [f"{copies}/train.beton", f"{copies}/val.beton"]
    known = json.loads(described)
    assert (known["num_samples"], known["classes"], known["source"]["kind"]) == (4, ["ant", "bee"], "image-folder")
    assert main(["info", str(train)]) == 0
    assert "writer   ffcv 1.0" in capsys.readouterr().out

    sidecar_path(train).unlink()
    refused = command("verify", train)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (65, 1)
    assert "has no sidecar" in refused.stderr
    described = command("verify", "--write-sidecar", train)
    assert (described.returncode, sidecar_path(train).is_file()) == (0, True), described.stderr
    again = command("verify", "--write-sidecar", train)
    assert (again.returncode, again.stderr.startswith("ERROR[65] ")) == (65, True)


def test_bad_images_are_listed_before_the_one_error(tmp_path: Path) -> None:
    folders = make_folders(tmp_path, ["ant", "bee"])
    (tmp_path / "val" / "bee" / "empty.jpg").touch()
    failed = command("image-folder", *folders)
    assert failed.returncode == 65
    *_, listed, error = failed.stderr.splitlines()
    assert listed == f"unusable image: {tmp_path}/val/bee/empty.jpg: is empty"
    assert error.startswith("ERROR[65] found 1 unusable image, but --skip-bad allows 0; the first: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 64, "COMMAND"),
        (["fashion-mnist"], 64, "--output"),
        (["fashion-mnist", "--out", "x"], 64, "--output"),  # no abbreviations
        (
            ["image-folder", "--train", "a", "--val", "b", "--output", "c", "--jpeg-quality", "101"],
            64,
            "'101' is not a whole number",
        ),
        (
            ["image-folder", "--train", "a", "--val", "b", "--output", "c", "--compress-probability", "nan"],
            64,
            "'nan' is not a number from 0",
        ),
        (
            ["image-folder", "--train", "a", "--val", "b", "--output", "c", "--write-mode", "smart"],
            64,
            "--smart-threshold",
        ),
        (["image-folder", "--train", "/nowhere", "--val", "b", "--output", "c"], 65, "/nowhere: does not exist"),
        (["fashion-mnist", "--source", "/nowhere", "--output", "c"], 65, "has neither train-images-idx3-ubyte"),
        (["imagenet", "--source", "/nowhere", "--output", "c"], 65, "/nowhere: has neither ILSVRC2012_img_train.tar"),
        (
            ["cifar100", "--source", "/nowhere", "--output", "c"],
            65,
            "/nowhere: is neither cifar-100-binary nor cifar-100-python",
        ),
        (["stage", "/nowhere.beton", "--output", "c"], 65, "/nowhere.beton: does not exist"),
        (["verify", "/nowhere.beton"], 65, "/nowhere.beton: does not exist"),
    ],
)
def test_errors_are_one_line(arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == code
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"ERROR[{code}] ")
    assert message in line
    assert output.out == ""


def test_wrong_arguments_are_refused_before_anything_heavy_is_imported() -> None:
    code = "import sys; from data_prep.__main__ import main; main(['verify']); "
    code += "print({'numpy', 'torch', 'ffcv'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_signal_is_one_line_and_its_code(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from data_prep import doctor, __main__ as m\n"
        "doctor.run = lambda: os.kill(os.getpid(), signal.SIGTERM); sys.exit(m.main(['doctor']))"
    )
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (143, "ERROR[143] stopped by SIGTERM; do: start it again\n")


def test_doctor_names_every_package() -> None:
    answer = command("doctor")
    assert answer.returncode in (0, 69)
    assert "libturbojpeg0-dev" in answer.stdout
