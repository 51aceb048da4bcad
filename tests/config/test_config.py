from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import schema
from pipeline.config.load import REPOSITORY_CONFIGS, config_digest, config_of, differences, load_config, to_yaml
from pipeline.config.schema import KEYS
from pipeline.errors import ConfigError
from pipeline.models.names import MODELS
from pipeline.sparse.distribution import DISTRIBUTIONS
from pipeline.sparse.strategy import METHODS, SCOPES

DATA = ["data.train=train.beton", "data.val=val.beton"]
SHIPPED = sorted(path.name for path in REPOSITORY_CONFIGS.glob("*.yaml"))
TRAIN = Path(__file__).parents[2] / "launchers" / "train.py"


def refused(*overrides: str, config: str = "imagenet_r50_s90") -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, [*DATA, *overrides])
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_are_valid_open_with_their_command_and_survive_printing(name: str, tmp_path: Path) -> None:
    config = load_config(name, DATA)
    header = (REPOSITORY_CONFIGS / name).read_text().split("\nname:")[0].split("\nbase:")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    assert all(word in header for word in ("command", "hardware", "expect")), name
    printed = tmp_path / "printed.yaml"
    printed.write_text(to_yaml(config))
    assert load_config(str(printed)) == config


def test_tables_of_choices_are_those_of_the_code() -> None:
    assert set(schema.KEYS["sparsity.method"].choices) == set(METHODS)
    assert set(schema.KEYS["sparsity.scope"].choices) == set(SCOPES)
    assert set(schema.KEYS["sparsity.distribution"].choices) == set(DISTRIBUTIONS)


def test_the_names_of_models_are_those_that_are_built() -> None:
    from pipeline.models import registry

    assert set(MODELS) == set(registry.names())


def test_base_files_and_overrides_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("name: a\nseed: 1\nsparsity: {density: 0.3, method: set}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nseed: 2\nsparsity: {density: 0.4}\n")
    overrides = [*DATA, "seed=3", "plan.exploration.update_interval=100 steps"]
    config = load_config(str(tmp_path / "b.yaml"), overrides)
    assert (config.name, config.seed, config.sparsity.density, config.sparsity.method) == ("a", 3, 0.4, "set")
    assert config.output_dir == "runs/a"


def test_a_base_that_leads_back_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    assert "the base: lines form a loop: a.yaml → b.yaml → a.yaml; do: remove one" in refused(
        config=str(tmp_path / "a.yaml")
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sparsity.densty=0.2", "unknown key 'sparsity.densty'; did you mean 'sparsity.density'?"),
        ("densty=0.2", "unknown key 'densty'; did you mean 'sparsity.density'?"),
        ("sparsity.density=0", "sparsity.density: expected a number > 0 and <= 1, got 0.0"),
        ("sparsity.density=1.5", "sparsity.density: expected a number > 0 and <= 1, got 1.5"),
        ("sparsity.density=nan", "expected a finite number, got 'nan'"),
        ("sparsity.method=rigel", "grasp, synflow; did you mean 'rigl'?"),
        (
            "train.global_batch=010",
            "expected a whole number written in digits 0–9 without leading zeros, such as 1000, got '010'",
        ),
        ("train.global_batch=-8", "train.global_batch: expected a whole number > 0, got -8"),
        ("train.channels_last=on", "expected true or false, got 'on'"),
        ("plan.exploration.length=90", "'512000 samples' or '90 epochs', got '90'"),
        ("plan.exploration.update_interval=0 steps", "expected more than 0, got '0 steps'"),
        ("plan.exploration=3", "plan.exploration: expected a mapping (key: value pairs), got '3'"),
        ("data.mean=[1,2]", "data.mean: expected three numbers, one per colour channel, got [1.0, 2.0]"),
        ("data.first_resolution=256", "data.first_resolution: 256 is larger than data.train_resolution 224"),
        ("data.first_resolution=160", "data.ramp_until: expected more than data.ramp_from (0), got 0"),
        ("data.ramp_until=3", "needs data.first_resolution, the resolution to start from"),
        ("data.order=quasirandom", "is not one of random, quasi_random; did you mean 'quasi_random'?"),
        ("data.mixup=-1", "data.mixup: expected a number from 0 to 100, got -1.0"),
        ("output_dir=${oc.env:HOME}", "would copy the environment"),
        ("plan.timetable=dense", "needs sparsity.method 'dense'"),
        ("plan.num_refinements=0", "plan.num_refinements: is 0, but plan.timetable 'sup_tickets' needs at least 1"),
        ("train.deepspeed={zero_optimisation: {stage: 2}}", "train.deepspeed.zero_optimisation"),
        ("evaluation.superposition=means", "did you mean 'mean'?"),
        ("evaluation.superposition=greedy_soup", "chooses by accuracy on held-out images; set evaluation.held_out"),
        ("evaluation.coefficients=[0.5, 1.0]", "expected numbers > 0 and < 1, got [0.5, 1.0]"),
        ("evaluation.ticket_weights=[1.0, 0.0]", "expected numbers > 0, got [1.0, 0.0]"),
        ("tickets.dtype=fp16", "tickets.dtype: 'fp16' is not one of fp32, bf16"),
        ("sparsity.own_step_warmup=9", "sparsity.own_step_warmup: needs sparsity.own_step_counts true"),
        ("tickets.keep=0", "tickets.keep: expected a whole number > 0, got 0"),
        ("name=Bad Name", "starting with a letter or digit, got 'Bad Name'"),
        ("seed=-1", "seed: expected a whole number from 0 to 9223372036854775807, got -1"),
        ("train.accumulation=7", "expected a divisor of train.global_batch (1024), got 7"),
        ("plan.refinement=null", "plan.refinement: is null, but plan.timetable 'sup_tickets' needs"),
        ("train.deepspeed={zero_optimization: {stage: 2}}", "cannot be set; remove it, and set train.zero_stage"),
        ("seed", "command line: expected key=value, got 'seed'"),
        ("sparsity.density=1e-400", "'1e-400' is too small and would be rounded to 0"),
        ("sparsity.dense_layers=fc", "expected a list, got 'fc'; write [fc]"),
        ("sparsity.dense_layers=[[fc]]", "sparsity.dense_layers: expected every entry to be text, got a list"),
        ("data.mean=[1, x, 2]", "data.mean: expected every entry to be a finite number, got 'x'"),
        (
            "plan.exploration.lr.milestones=[30]",
            "plan.exploration.lr.milestones: expected every entry to be a number and a unit, such as '4000 steps', "
            "'512000 samples' or '90 epochs', got '30'",
        ),
        ("plan.exploration.lr.milestones=[0 steps]", "expected every entry to be more than 0, got '0 steps'"),
    ],
)
def test_invalid_values_are_named(override: str, expected: str) -> None:
    assert expected in refused(override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "data.mean=[0.485, 0.456, 0.406]",
            "data.mean: expected numbers on the 0–255 scale, got [0.485, 0.456, 0.406] on the 0–1 scale; "
            "write [123.675, 116.28, 103.53]",
        ),
        ("data.std=[0.229, 0.224, 0.225]", "write [58.395, 57.12, 57.375]"),
        ("model.args.widht=8", "model.args.widht: is not an argument of cifar_resnet8; did you mean 'width'?"),
        ("model.args.depth=8", "model.args.depth: is not an argument of cifar_resnet8; it takes width, stem_stride"),
        ("model.args.width=8.0", "model.args.width: expected a whole number of at least 1, got 8.0"),
        ("model.args.width=0", "model.args.width: expected a whole number of at least 1, got 0"),
        ("model.name=wrn_16_2", "model.args.width: is not an argument of wrn_16_2; it takes none"),
        (
            "model.num_classes=1",
            "model.num_classes: expected 0 (taken from the data set) or at least 2, got 1",
        ),
        ("tracking.uri=mlruns", "tracking.uri: expected a URI, got 'mlruns'; write http://HOST:PORT (or"),
        ("tracking.uri=/mnt/mlflow.db", "sqlite:////path/mlflow.db for a file"),
        ("tracking.uri=localhost:5000", "expected a URI, got 'localhost:5000'; did you mean 'http://localhost:5000'?"),
        ("tracking.uri=sqlite://mlflow.db", "expected a URI, got 'sqlite://mlflow.db'"),
        ("tracking.uri=http:/host:5000", "expected a URI, got 'http:/host:5000'"),
    ],
)
def test_what_cannot_work_is_refused(override: str, expected: str) -> None:
    assert expected in refused(override, config="fashion_mnist_s90")


def test_a_password_in_what_is_not_a_uri_is_not_repeated() -> None:
    assert "hunter2" not in refused("tracking.uri=me:hunter2@host:5000")


@pytest.mark.parametrize(
    "override",
    [
        "data.mean=[0.0, 0.0, 0.0]",  # with a standard deviation of 1 or of 255: pixels as they are, or from 0 to 1
        "data.std=[1.0, 1.0, 1.0]",
        "data.mean=[0.5, 100, 100]",
        "tracking.uri=http://localhost:5000",
        "tracking.uri=sqlite:///mlflow.db",
        "tracking.uri=postgresql+psycopg2://me@db:5432/mlflow",
        "tracking.uri=file:///mnt/mlruns",
        "tracking.uri=databricks",
        "model.num_classes=0",
    ],
)
def test_what_looks_alike_and_can_work_is_accepted(override: str) -> None:
    load_config("imagenet_r50_s90", [*DATA, override])


def test_what_a_ticket_was_trained_with_is_accepted_in_its_evaluation() -> None:
    values = {"name": "e", "data": {"train": "t", "val": "v", "mean": [0.485] * 3, "std": [0.229] * 3}}
    assert config_of("provenance", values).data.mean == [0.485] * 3


@pytest.mark.parametrize(
    ("section", "name", "value"), [("model", "args", "width"), ("train", "deepspeed", "dump_state")]
)
def test_an_empty_mapping_clears_what_was_given_before(tmp_path: Path, section: str, name: str, value: str) -> None:
    (tmp_path / "base.yaml").write_text(f"name: a\n{section}: {{{name}: {{{value}: 4, steps_per_print: 9}}}}\n")
    (tmp_path / "more.yaml").write_text(f"base: base.yaml\n{section}: {{{name}: {{steps_per_print: 8}}}}\n")
    (tmp_path / "none.yaml").write_text(f"base: more.yaml\n{section}: {{{name}: {{}}}}\n")

    def read(file: str, *overrides: str) -> object:
        return getattr(getattr(load_config(str(tmp_path / file), [*DATA, *overrides]), section), name)

    assert read("more.yaml") == {value: 4, "steps_per_print": 8}
    assert read("none.yaml") == {}
    assert read("more.yaml", f"{section}.{name}={{}}") == {}
    assert read("more.yaml", f"{section}.{name}={{}}", f"{section}.{name}.{value}=5") == {value: 5}


def test_an_empty_mapping_inside_of_arguments_clears_too_and_an_empty_section_changes_nothing() -> None:
    nested = ["model.args.block={a: 1, b: 2}", "model.args.block={}", "model={}", "plan.refinement={}"]
    config = load_config("imagenet_r50_s90", [*DATA, *nested])
    assert config.model.args == {"block": {}}
    assert config == load_config("imagenet_r50_s90", [*DATA, "model.args.block={}"])
    assert (config.model.name, config.model.num_classes) == ("resnet50", 1000)


def test_the_tilde_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("name: a\noutput_dir: ~/runs/${name}\ndata: {train: ~/train, val: ~root/val}\n")
    (tmp_path / "mine.yaml").write_text("base: ~/base.yaml\n")
    config = load_config("~/mine.yaml", ["data.stage=~/fast", "evaluation.held_out=~", "tickets.copy_to=s3://b/~me"])
    assert config.output_dir == f"{tmp_path}/runs/a"
    assert (config.data.train, config.data.val) == (f"{tmp_path}/train", str(Path("~root").expanduser() / "val"))
    assert (config.data.stage, config.evaluation.held_out) == (f"{tmp_path}/fast", str(tmp_path))
    assert config.tickets.copy_to == "s3://b/~me"
    odd = load_config("~/mine.yaml", ["data.train=./~/cost$5$", "tracking.uri=http://me:pa$word@host:5000"])
    assert (odd.data.train, odd.tracking.uri) == ("./~/cost$5$", "http://me:pa$word@host:5000")


def test_every_key_whose_text_is_a_place_is_a_path() -> None:
    assert {name for name, key in KEYS.items() if key.is_path} == {
        *("output_dir", "data.train", "data.val", "data.stage"),
        *("evaluation.held_out", "tickets.copy_to", "tracking.uri", "model.from_ticket", "model.from_state"),
    }


def test_a_ticket_of_an_older_version_may_name_a_path_that_is_refused_now() -> None:
    values = {"name": "e", "output_dir": "$HOME/runs", "data": {"train": "~/t", "val": "v"}}
    config = config_of("provenance", values, ["evaluation.held_out=~root/h"])
    assert (config.output_dir, config.data.train) == ("$HOME/runs", "~/t")
    assert config.evaluation.held_out == str(Path("~root").expanduser() / "h")


def test_a_base_is_found_as_a_configuration_is_and_first_next_to_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    (tmp_path / "configs").mkdir()
    mine = tmp_path / "mine" / "mine.yaml"
    mine.write_text("base: fashion_mnist_s90.yaml\nname: mine\n")
    assert load_config(str(mine), DATA).model.name == "cifar_resnet8"  # of the repository
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / "fashion_mnist_s90.yaml").write_text("name: x\nmodel: {name: wrn_16_2}\n")
    assert load_config(str(mine), DATA).model.name == "wrn_16_2"
    (tmp_path / "mine" / "fashion_mnist_s90.yaml").write_text("name: x\nmodel: {name: vgg_c}\n")
    assert load_config(str(mine), DATA).model.name == "vgg_c"
    mine.write_text("base: fashion_mnist_s90\n")
    assert load_config(str(mine), DATA).model.name == "vgg_c"
    mine.write_text("base: fashion_mnist_s9\n")
    message = refused(config=str(mine))
    assert f"{mine}: base: fashion_mnist_s9: not found in {tmp_path / 'mine'}, {tmp_path}" in message
    assert "fashion_mnist_s90.yaml" in message


def test_what_is_wrong_with_a_base_is_said_of_the_file_that_names_it(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "folder"):
        mine.write_text(f"base: {name}\n")
        assert f"{mine}: base: {name}: {tmp_path / name}: is not a regular file; do: pass" in refused(config=str(mine))
        mine.write_text(f"base: {tmp_path / name}\n")
        assert f"{mine}: base: {tmp_path / name}: is not a regular file; do: pass" in refused(config=str(mine))
    assert f"--config {tmp_path / 'folder'}: is not a regular file" in refused(config=str(tmp_path / "folder"))
    other = tmp_path / "other.yaml"
    mine.write_text("base: other.yaml\n")
    for content, says in (
        (b"name: caf\xe9", "is not UTF-8 text (byte 0xe9 at position 9)"),
        (b"- a", "expected a mapping (key: value pairs), got a list"),
        (b"x" * (1 << 20), "is larger than 131072 bytes"),
    ):
        other.write_bytes(content)
        assert f"{mine}: base: {other}: {says}; do: " in refused(config=str(mine))


def test_all_errors_are_reported_at_once_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nsparsity:\n  densty: 0.1\ntrain:\n  global_batch: many\n")
    message = refused(config=str(path))
    assert f"{path}:3: unknown key 'sparsity.densty'" in message
    assert (
        f"{path}:5: train.global_batch: expected a whole number written in digits 0–9 without leading zeros" in message
    )


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "seed=[1",
            "override 'seed=[1': is not valid YAML: expected ',' or ']', but the text ends; do: correct the over",
        ),
        ("seed=99999999999999999999", "seed: '99999999999999999999' is too large; do: correct it"),
        ("output_dir=${output_dir}", "output_dir: refers to itself; do: correct it; "),
        ("name=${nope}", "override 'name=${nope}': name: ${nope} refers to a key that does not exist"),
        ("model.args={1: 2}", "override 'model.args={1: 2}': model.args: keys must be text; write '1' instead of 1"),
        ("model.args={a: [2020-01-01]}", "model.args.a: a date is not supported; put it in quotes"),
        ("model.args={a: *b}", "override 'model.args={a: *b}': uses a YAML alias (*b), which is not supported"),
        ("model.args={a: !!python/name:os.system }", "model.args: the tag !!python/name:os.system is not supported"),
        ('output_dir="\\ud800"', "output_dir: contains an unpaired surrogate (\\ud800)"),
        ('model.args={a: "\\ud800"}', "model.args.a: contains an unpaired surrogate (\\ud800)"),
        ("name=\x03", "the character U+0003 is not allowed"),
        (
            "tracking.passwd=hunter2",
            "override 'tracking.passwd=[redacted]': unknown key 'tracking.passwd'; expected one",
        ),
        ("sparsity.density=7", "do: correct it; launchers/train.py --help-config sparsity.density explains the key"),
    ],
)
def test_an_error_of_a_library_is_in_our_words_and_advice_names_the_key(override: str, expected: str) -> None:
    assert expected in refused(override)


def test_what_is_not_a_configuration_file_is_named_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".hidden.yaml").touch()
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (tmp_path / "large.yaml").write_bytes(b"#" * (1 << 18))
    assert "/dev/zero: is not a regular file; do: pass the YAML" in refused(config="/dev/zero")
    assert "--config /nowhere/x.yaml: does not exist; do: pass an existing file, such as" in refused(
        config="/nowhere/x.yaml"
    )
    assert "is not UTF-8 text (byte 0xe9 at position 9); do: save it as UTF-8" in refused(config="latin.yaml")
    assert "large.yaml: is larger than 131072 bytes; do: pass the YAML" in refused(config="large.yaml")
    assert ".hidden" not in refused(config="hidden")


def test_missing_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data.train: is required; set it in imagenet_r50_s90 or.*val: is required"):
        load_config("imagenet_r50_s90")


def test_only_what_changes_the_mathematics_changes_the_digest() -> None:
    base = load_config("imagenet_r50_s90", DATA)
    moved = load_config(
        "imagenet_r50_s90", ["data.train=/elsewhere", "data.val=v", "data.num_workers=2", "tracking.backend=none"]
    )
    other = load_config("imagenet_r50_s90", [*DATA, "sparsity.density=0.2"])
    assert config_digest(base) == config_digest(moved) != config_digest(other)
    assert differences(dataclasses.asdict(base), dataclasses.asdict(other)) == ["sparsity.density: 0.1 -> 0.2"]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--config", "imagenet_r50_s9"], 64, "not found in"),
        (["--config", "imagenet_r50_s90", *DATA, "sparsity.densty=0.2"], 64, "did you mean 'sparsity.density'?"),
        (["--config", "imagenet_r50_s90", *DATA, "sparsity.density=7"], 64, "sparsity.density"),
        (["--config", "imagenet_r50_s90", *DATA], 65, "train.beton"),
        (["--configuration", "x"], 64, "command line"),
        (["--config", "imagenet_r50_s90", *DATA, "--check"], 0, ""),
        (["--config", "imagenet_r50_s90", *DATA, "--print-plan"], 0, ""),
    ],
)
def test_the_command_line_answers_in_a_second_with_one_line_and_a_code(
    arguments: list[str], code: int, expected: str
) -> None:
    # --check runs the outline of the network, so the time to load torch and torchvision, of this machine, comes on top.
    loading = timed([sys.executable, "-c", "import torch, torchvision.models"])[1] if "--check" in arguments else 0.0
    done, seconds = timed([sys.executable, str(TRAIN), *arguments])
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith(f"ERROR[{code}] rank=0 ")
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr
    assert seconds - loading < (3 if loading else 5)


def timed(command: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    return done, time.monotonic() - started
