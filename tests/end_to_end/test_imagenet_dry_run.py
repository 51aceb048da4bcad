"""From archives with ImageNet's structure to steps of the real ResNet-50, on two ranks.

The archives hold 1,000 classes of JPEG photographs; ResNet-50 trains at 224 px. By torchrun, and on one rank
without a launcher: ``python -m tests.campaigns.recipes imagenet_r50_s90``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.imagenet_shaped import make_archives, make_image_folder
from tests.support.launch import ROOT, command, run

TRAIN = ROOT / "launchers" / "train.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    train, val = make_image_folder(folder / "images", num_classes=1000, train_per_class=1, val_per_class=1)
    archives = make_archives(folder / "archives", train, val)
    prepare = ["imagenet", "--source", str(archives), "--output", str(folder), "--workers", "2"]
    text = run([*command("python", "-m", ["data_prep"]), *prepare], log=folder / "log")
    assert "train.beton: 1000 samples, 1000 classes, mixed images" in text
    return folder


def test_dry_run_of_the_shipped_recipe(data: Path, tmp_path: Path) -> None:
    files = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"output_dir={tmp_path / 'run'}"]
    arguments = ["--config", "imagenet_r50_s90.yaml", "--dry-run", *files]
    text = run(command("deepspeed", TRAIN, arguments, ranks=2), log=tmp_path / "log", timeout_seconds=500)
    said = "2,550,291 of 25,502,912 weights active in 54 layers; network density 0.1019; dense: 54,120 biases, scales"
    assert said in text
    shares = re.findall(r"ticket \d after step \d+: end of .*, R_s (0\.\d+)", text)
    assert len(set(shares)) == 5 and shares == sorted(shares)  # masks are updated in each phase
    done = "10 steps in 5 phases, 10 networks and ensembles evaluated"  # 5 tickets, superposed, ensembles of 2 to 5
    assert f"dry run of imagenet_r50_s90: ok, {done}; nothing was kept" in text
    assert f"{tmp_path / 'run'}.dry-run" not in text, "a path that is removed"
    assert "ticket-0" not in text, "a table of a few images means nothing"
    assert not any(tmp_path.glob("run*")), "the folder of a dry run is removed"
