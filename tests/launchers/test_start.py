"""The first minute: a Python without the packages, another folder, and arguments as other programs have them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launchers.train_cli import parse
from pipeline.command_line import run_to_end
from pipeline.config.load import load_config
from pipeline.config.other_names import OTHER_NAMES
from pipeline.config.schema import KEYS
from pipeline.errors import ConfigError

CHECKOUT = Path(__file__).resolve().parents[2]
BARE = [sys.executable, "-S", "-E"]  # a Python that sees the standard library only
CONFIG = ["--config", "fashion_mnist_s90.yaml"]


@pytest.mark.parametrize("script", ["launchers/train.py", "launchers/evaluate.py"])
def test_without_the_environment_one_line_says_how_to_enter_it(script: str, tmp_path: Path) -> None:
    done = subprocess.run([*BARE, str(CHECKOUT / script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert done.stderr.startswith("ERROR[69] ")
    assert "lacks torch, numpy, omegaconf; do: source " in done.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["launchers.run", "--", "x.py"],
        ["launchers.describe", "--model", "resnet18", "--density", "0.1"],
        ["data_prep", "verify", "README.md"],
        ["pipeline.tickets", "verify", "README.md"],
    ],
    ids=" ".join,
)
def test_commands_without_the_environment_end_in_one_line(command: list[str]) -> None:
    done = subprocess.run([*BARE, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (69, "", 1)
    assert done.stderr.startswith("ERROR[69] ")


def test_the_scripts_run_from_any_folder(tmp_path: Path) -> None:
    """With the packages alone on the path, as in an environment that the project is not installed in."""
    packages = [path for path in sys.path if "site-packages" in path]
    command = f"import sys, runpy; sys.path += {packages}; sys.argv = ['train.py', *{[*CONFIG, '--print-config']}];"
    command += f"runpy.run_path({str(CHECKOUT / 'launchers/train.py')!r}, run_name='__main__')"
    done = subprocess.run([*BARE, "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "name: fashion_mnist_s90" in done.stdout


def test_a_package_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    def needs_a_package() -> int:
        import a_package_that_nobody_has  # type: ignore[import-not-found]

        return int(a_package_that_nobody_has)

    assert run_to_end(needs_a_package) == 69
    assert capsys.readouterr().err.startswith("ERROR[69] a_package_that_nobody_has is not installed for ")


@pytest.mark.parametrize(
    ("arguments", "what", "do"),
    [
        (["--epochs", "10"], "--epochs is not an option", "plan.exploration.length='10 epochs'"),
        ([*CONFIG, "--epochs=10"], "--epochs is not an option", "plan.exploration.length='10 epochs'"),
        ([*CONFIG, "--batch-size", "32"], "--batch-size is not an option", "train.global_batch=32"),
        ([*CONFIG, "--lr", "0.1"], "--lr is not an option", "plan.exploration.lr.value=0.1"),
        ([*CONFIG, "--lr", "--check"], "--lr is not an option", "plan.exploration.lr.value=…"),
        ([*CONFIG, "--optim", "a b"], "--optim is not an option", "train.optimizer=…"),
        ([*CONFIG, "--density", "0.2"], "--density is not an option", "sparsity.density=0.2"),
        ([*CONFIG, "--sparsity.density=0.2"], "--sparsity.density is not an option", "sparsity.density=0.2"),
        ([*CONFIG, "--sparsity", "0.9"], "--sparsity is not an option", "sparsity.density=… (1 − the sparsity)"),
        ([*CONFIG, "--gpus", "2"], "--gpus is an option of launchers", "torchrun --nproc-per-node N"),
        ([*CONFIG, "--dryrun"], "--dryrun is not an option; did you mean --dry-run?", "see launchers/train.py --help"),
        (
            ["imagenet_r50_s90.yaml"],
            "imagenet_r50_s90.yaml: a configuration is chosen with",
            "--config imagenet_r50_s90",
        ),
        (["config=x.yaml"], "config=x.yaml: a configuration is chosen with --config", "--config x.yaml"),
        (["-c", "x.yaml"], "-c is not an option", "--config x.yaml"),
        (["--cfg=x.yaml"], "--cfg is not an option", "--config x.yaml"),
        (["--config"], "--config needs a value", "pass --config NAME"),
        ([*CONFIG, "--resume"], "--resume needs a value", "pass --resume auto"),
        (["--resume", *CONFIG], "--resume needs a value", "pass --resume auto"),
        ([*CONFIG, "--resume="], "--resume needs a value", "pass --resume auto"),
        ([*CONFIG, "--bogus", "3"], "unrecognized arguments: --bogus", "see launchers/train.py --help"),
        (["seed=1"], "the following arguments are required: --config", "see launchers/train.py --help"),
    ],
)
def test_a_slip_gets_the_hint_that_helps(arguments: list[str], what: str, do: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert caught.value.what.startswith(f"command line: {what}")
    assert caught.value.do.startswith(do)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.epochs=90", "plan.exploration.length"),
        ("epochs=90", "plan.exploration.length"),
        ("train.lr=0.1", "plan.exploration.lr.value"),
        ("batch_size=32", "train.global_batch"),
        ("model=resnet18", "model.name"),
    ],
)
def test_a_key_that_others_call_otherwise_is_named(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean '{key}'"):
        load_config("fashion_mnist_s90.yaml", [override])


def test_what_is_good_is_no_slip() -> None:
    for given in (["--config=a.yaml"], ["b=1.yaml", "--config", "a.yaml", "--resume=auto", "--resume", "none"]):
        assert parse(given).config == "a.yaml"


def test_every_hint_names_keys_that_there_are() -> None:
    for text in OTHER_NAMES.values():
        for part in text.split(" (")[0].replace("'{} epochs'", "{}").replace("'{} steps'", "{}").split():
            assert KEYS[part.partition("=")[0]].section is None
