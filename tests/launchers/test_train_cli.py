"""What the command line of training refuses or warns about before anything starts."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launchers import train_cli
from pipeline.config.load import config_digest
from pipeline.config.schema import Config
from pipeline.plan import Plan
from tests.campaigns.cases import Good, make_good
from tests.support.launch import ROOT


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Good:
    """Twelve images of three classes, and a configuration of a short Sup-tickets run on them, in batches of four."""
    made = make_good(tmp_path_factory.mktemp("good"))
    shutil.rmtree(made.root / "run")
    return made


class Started:
    """Stands for launchers.train.train: keeps what it is called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Config, Plan]] = []

    def __call__(self, config: Config, plan: Plan, **_: Any) -> Any:
        self.calls.append((config, plan))
        return SimpleNamespace(rows=())  # a report


def started_with(good: Good, *more: str, code: int = 0) -> Config | None:
    """The configuration that training was called with; None when it was not."""
    train = Started()
    assert train_cli.main(train, ["--config", str(good.config), *more]) == code
    return train.calls[0][0] if train.calls else None


def test_portable_limits_the_instructions_before_torch_is_imported(good: Good) -> None:
    code = "import os, sys; from launchers import train_cli; train_cli.main(print, sys.argv[1:]); "
    code += "print(os.environ['ATEN_CPU_CAPABILITY'], os.environ['ONEDNN_MAX_CPU_ISA'], 'torch' in sys.modules)"
    arguments = good.train("train.portable=true", "--print-config")[2:]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "avx2 AVX2 False", done.stderr


def test_the_number_of_classes_is_the_data_sets(good: Good) -> None:
    counted, stated = started_with(good, "model.num_classes=0"), started_with(good, "model.num_classes=3")
    assert counted is not None and stated is not None
    assert counted == stated
    assert (counted.model.num_classes, config_digest(counted)) == (3, config_digest(stated))
    folders = [f"data.train={good.root}/images/train", f"data.val={good.root}/images/val", "data.loader=folder"]
    of_folders = started_with(good, "model.num_classes=0", "train.global_batch=2", *folders)
    assert of_folders is not None and of_folders.model.num_classes == 2


@pytest.mark.parametrize("option", [[], ["--check"], ["--print-plan"], ["--dry-run"]])
@pytest.mark.parametrize("stated", [2, 4])
def test_another_number_of_classes_is_refused(
    good: Good, capsys: pytest.CaptureFixture[str], option: list[str], stated: int
) -> None:
    assert started_with(good, *option, f"model.num_classes={stated}", code=65) is None
    assert (
        f"train.beton: has 3 classes, but model.num_classes is {stated}; do: set model.num_classes=3"
        in capsys.readouterr().err
    )


def test_a_set_of_one_class_is_refused(good: Good, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        shutil.copytree(good.root / "images" / split / "ant", tmp_path / split / "ant")
    sets = [f"data.train={tmp_path}/train", f"data.val={tmp_path}/val", "data.loader=folder", "model.num_classes=0"]
    assert started_with(good, *sets, code=65) is None
    assert "has 1 class, expected at least 2" in capsys.readouterr().err


def test_a_configuration_is_checked_without_its_data(good: Good, capsys: pytest.CaptureFixture[str]) -> None:
    away = ["data.train=/nowhere/train.beton", "data.train_samples=12", "model.num_classes=0"]
    assert started_with(good, "--check", *away) is None
    assert "valid, 21 steps" in capsys.readouterr().out
    assert started_with(good, "--print-config", *away) is None
    assert "  num_classes: 0\n" in capsys.readouterr().out


@pytest.mark.parametrize("option", [[], ["--check"], ["--dry-run"]])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=resnet18"], "model.args: resnet18: .*'width'"),  # the arguments are the demo's
        (["model.args={}", "model.name=timm/resnte18"], "model.name: 'timm/resnte18' is no.* model"),
        (["model.args={}", "model.name=timm/resnet18", "model.args.deepth=3"], "model.args: timm/resnet18: .*'deepth'"),
    ],
)
def test_what_a_librarys_network_does_not_take_is_refused_before_the_ranks_meet(
    good: Good, capsys: pytest.CaptureFixture[str], option: list[str], overrides: list[str], expected: str
) -> None:
    assert started_with(good, *option, *overrides, code=64) is None
    err = capsys.readouterr().err
    assert re.fullmatch(rf"ERROR\[64\] rank=0 {expected}.*\n", err), err


def test_arguments_that_the_network_takes_are_accepted(good: Good) -> None:
    taken = ["model.args={}", "model.name=resnet18", "model.args.zero_init_residual=true"]
    config = started_with(good, *taken)
    assert config is not None and config.model.args == {"zero_init_residual": True}


VIT = [
    *("model.args={}", "model.name=timm/vit_tiny_patch16_224", "model.args.img_size=32", "model.args.depth=1"),
    "data.train_resolution=32",
]
ALEXNET = ["model.args={}", "model.name=alexnet", "data.train_resolution=64"]
RESNET = ["model.args={}", "model.name=resnet18", "data.train_resolution=32", "data.eval_resolution=32"]
RAMP = ["data.ramp_until=3", "data.augmentation=random_resized_crop"]
UNTAKEN = [
    (
        [*VIT, "data.eval_resolution=48"],
        r"data.eval_resolution: timm/vit_tiny\S+ does not run on images of 3×48×48 pixels: AssertionError: Input",
    ),
    ([*VIT, "data.train_resolution=48"], "data.train_resolution: .* does not train on images of 3×48×48 pixels"),
    (
        [*VIT, *RAMP, "data.eval_resolution=32", "data.first_resolution=16"],
        "data.first_resolution: .* images of 3×16×16",
    ),
    (
        [*ALEXNET, *RAMP, "data.train_resolution=160", "data.first_resolution=32"],
        "data.first_resolution: alexnet does not train on images of 3×32×32 pixels: RuntimeError: .* too small",
    ),
    ([*ALEXNET, "data.eval_resolution=32"], "data.eval_resolution: alexnet does not run on images of 3×32×32"),
    ([*RESNET, "train.accumulation=4"], "train.global_batch: 4 images divided by 1 × 4 .* give a micro-batch of 1"),
    ([*VIT, "model.args.in_chans=1"], "data.train_resolution: .* images of 3×32×32 pixels: RuntimeError"),
    (
        ["model.args={}", "model.name=googlenet", "model.args.aux_logits=true", "data.train_resolution=64"],
        r"model.args: googlenet returns GoogLeNetOutputs in training, expected one tensor of shape \[4, 3\] "
        r"\(images, classes\); do: set model.args.aux_logits=false",
    ),
    (
        ["model.args={}", "model.args={output_stride: 16, features_only: true}", "model.name=timm/resnet18"],
        "model.args: timm/resnet18 returns list in training, .*; do: set model.args.features_only=false",
    ),
    (
        ["model.args={}", "model.args.num_classes=3", "model.name=timm/resnet18"],
        "model.args.num_classes: cannot be set; do: remove it, and set model.num_classes",
    ),
    (["evaluation.recalibration_batch=13"], r"evaluation.recalibration_batch: 13 is larger than .* \(12 samples\)"),
]


@pytest.mark.parametrize("option", [[], ["--check"]])
@pytest.mark.parametrize(("overrides", "expected"), UNTAKEN)
def test_images_that_the_network_does_not_take_are_refused_before_the_first_step(
    good: Good, capsys: pytest.CaptureFixture[str], option: list[str], overrides: list[str], expected: str
) -> None:
    assert started_with(good, *option, *overrides, code=64) is None
    err = capsys.readouterr().err
    assert re.fullmatch(rf"ERROR\[64\] rank=0 {expected}.*\n", err) and "; do: " in err, err


@pytest.mark.parametrize(
    "taken",
    [
        [*VIT, "data.eval_resolution=32"],
        [*VIT, *RAMP, "model.args.dynamic_img_size=true", "data.first_resolution=16", "data.eval_resolution=48"],
        [*RESNET, "train.accumulation=2"],
        [*RESNET, "train.accumulation=4", "data.train_resolution=64"],  # maps of 2×2: a variance even of one image
        ["evaluation.recalibration_batch=12"],
        ["evaluation.recalibration_batch=13", "plan.num_refinements=1", "evaluation.with_exploration=false"],
        ["evaluation.recalibration_batch=13", "tickets.keep=1", "tickets.keep_first=false"],
    ],
)
def test_images_that_the_network_takes_are_accepted(good: Good, taken: list[str]) -> None:
    state = torch.get_rng_state()
    assert started_with(good, *taken) is not None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_micro_batch_of_a_rank_is_what_is_checked(
    good: Good, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    assert started_with(good, *RESNET, code=64) is None
    assert "4 images divided by 4 × 1 (ranks × train.accumulation) give a micro-batch of 1" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_run_would(good: Good, capsys: pytest.CaptureFixture[str]) -> None:
    assert started_with(good, "--dry-run", *RESNET, "train.accumulation=4", code=64) is None
    assert "give a micro-batch of 1" in capsys.readouterr().err


LONG = ["plan.exploration.length=10 epochs", "plan.exploration.lr.schedule=constant"]
CONSTANT = "exploration ends at its highest learning rate"


@pytest.mark.parametrize("option", ["--check", "--print-plan"])
def test_warnings_are_printed_on_stderr(good: Good, capsys: pytest.CaptureFixture[str], option: str) -> None:
    started_with(good, option, *LONG)
    printed = capsys.readouterr()
    assert len([line for line in printed.err.splitlines() if line.startswith(f"warning: {CONSTANT}")]) == 1
    assert "warning" not in printed.out


@pytest.mark.parametrize(("rank", "times"), [("0", 1), ("1", 0)])
def test_warnings_are_logged_once_before_training(
    good: Good, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, rank: str, times: int
) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        monkeypatch.setenv(name, value)
    assert started_with(good, *LONG) is not None
    warned = [record for record in caplog.records if record.getMessage().startswith(CONSTANT)]
    assert [record.levelname for record in warned] == ["WARNING"] * times


def test_a_plan_without_updates_is_refused_and_a_dry_run_only_says_so(
    good: Good, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for option in ([], ["--check"], ["--print-plan"]):
        assert started_with(good, *option, "plan.timetable=itop", code=64) is None
        assert "there is no topology update in the run's 12 steps" in capsys.readouterr().err
    assert started_with(good, "--dry-run", "plan.timetable=itop") is not None
    assert "with these 12 training samples the run itself would fail: plan: " in caplog.text


def test_a_dry_run_on_a_stand_in_that_is_too_small_for_any_plan_has_that_of_the_recipe(
    good: Good, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    granet = ["sparsity.method=granet", "sparsity.density_until=1 epochs", "plan.exploration.update_interval=1 epochs"]
    granet += ["plan.timetable=itop", "plan.exploration.length=1 epochs"]
    assert started_with(good, "--dry-run", *granet, code=64) is None
    assert "sparsity.density_until: no update follows 1 epochs (step 15000 of 15000)" in capsys.readouterr().err
    longer = ["plan.exploration.update_interval=20 steps", "plan.exploration.length=2 epochs"]
    assert started_with(good, *granet, *longer, code=64) is None  # the run itself has 3 steps an epoch
    caplog.clear()
    train = Started()
    arguments = ["--config", str(good.config), "--dry-run", *granet, *longer]
    assert train_cli.main(train, arguments) == 0  # the recipe has 60,000 images: 15,000 steps an epoch
    assert "with these 12 training samples the run itself would fail: sparsity.density_until: no update" in caplog.text
    (phase,) = train.calls[0][1].phases
    due = phase.update_at(phase.start)
    assert due is not None and due.density == train.calls[0][0].sparsity.density
