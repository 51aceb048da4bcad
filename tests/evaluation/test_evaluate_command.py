"""``launchers/evaluate.py`` with real files and processes, without a training configuration."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import superposition
from benchmarks.support.samples import sample_provenance
from launchers import evaluate_cli
from pipeline import models
from pipeline.datasets.beton_format import read_tables
from pipeline.datasets.sidecar import verify
from pipeline.errors import DataError
from pipeline.evaluation import inputs
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.update import magnitude_masks
from pipeline.superposition.rules import RULES
from pipeline.tickets.__main__ import main as tickets_command
from pipeline.tickets.format import decode, ticket_of
from pipeline.tickets.store import TicketStore
from tests.end_to_end.small_job import NUM_VAL, make_data
from tests.support.launch import ROOT, command, run
from tests.support.packages import require_fashion_mnist

EVALUATE = ROOT / "launchers" / "evaluate.py"
PREPROCESSING = {
    "augmentation": "none",
    "min_scale": 0.08,
    "flip": True,
    "train_resolution": 28,
    "eval_resolution": 28,
    "eval_ratio": 1.0,
}
PREPROCESSING |= {"mean": [72.94] * 3, "std": [90.02] * 3}
SMALL = [
    "evaluation.recalibration_batch=50",
    "evaluation.recalibration_batches=4",
    "data.num_workers=1",
    "tracking.backend=jsonl",
]


Network = tuple[str, dict[str, Any]]
RESNET: Network = ("cifar_resnet8", {"width": 4, "stem_stride": 2})


def make_tickets(
    folder: Path, seeds: list[int], *, digests: tuple[str, str], method: str = "rigl", network: Network = RESNET,
    **changes: Any,
) -> None:  # fmt: skip
    """Save tickets of untrained networks, one per seed, at density 0.2 (method dense: 1)."""
    store = TicketStore(folder, owner=f"run-{seeds[0]}")
    for index, seed in enumerate(seeds):
        model_name, args = network
        model = models.build(model_name, num_classes=10, args=args, seed=seed)
        weights = sparse_weights(model)
        density = 1.0 if method == "dense" else 0.2
        masks = magnitude_masks(dict(weights), round(density * sum(weight.numel() for weight in weights.values())))
        for name, weight in weights.items():
            weight.data.mul_(masks[name])
        provenance = {
            "index": index,
            "model": model_name,
            "model_args": args,
            "num_classes": 10,
            "method": method,
            "phase": f"refinement-{index}",
            "density": density,
            "seed": seeds[0],
            "data_digest": digests[0],
            "class_list_digest": digests[1],
            "parent_run": f"run-{seeds[0]}",
            "extra": {
                "training_flops_ratio": 0.25 * (index + 1),
                "inference_flops_ratio": 0.25,
                "dense_reference_epochs": 2.0,
            },
            "preprocessing": PREPROCESSING,
        }
        store.save(ticket_of(model, masks, provenance=sample_provenance(**(provenance | changes))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/, a/tickets and b/tickets (two runs with two tickets each), dense/tickets, c/.

    c/ has "corrupted" copies that equal the set itself.
    """
    require_fashion_mnist()
    root = tmp_path_factory.mktemp("evaluate")
    for name in ("source", "data", "c"):
        (root / name).mkdir()
    make_data(root / "source", root / "data")
    train = verify(root / "data" / "train.beton")
    digests = (train.digest, str(train.sidecar["classes_sha256"]))
    make_tickets(root / "a" / "tickets", [1, 2], digests=digests)
    make_tickets(root / "b" / "tickets", [3, 4], digests=digests)
    make_tickets(root / "dense" / "tickets", [5], digests=digests, method="dense")
    for name in ("fog-1", "fog-3", "snow-1"):
        for ending in (".beton", ".beton.json"):
            shutil.copy(root / "data" / f"val{ending}", root / "c" / f"{name}{ending}")
    return root


def arguments(folder: Path, output: Path, *more: str, tickets: tuple[str, ...] = ("a",)) -> list[str]:
    folders = [str(folder / name / "tickets") for name in tickets]
    return ["--tickets", *folders, "--data", f"{folder}/data/val.beton", "--output", str(output), *SMALL, *more]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """A report with everything, made under plain python, outside the checkout."""
    output = folder / "whole"
    asked = [
        "--recalibrate",
        f"{folder}/data/train.beton",
        "--corrupted",
        f"{folder}/c",
        "--ood",
        f"{folder}/data/train.beton",
    ]
    asked += ["--adversarial", "--adversarial-images", "200", "--pgd-steps", "2", "--temperature"]
    run(command("python", EVALUATE, arguments(folder, output, *asked)), cwd=folder, log=folder / "whole.log")
    return output


def test_every_metric_in_one_command(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert [row["name"] for row in report["rows"]] == ["ticket-0", "ticket-1", "superposition-mean", "ensemble-2"]
    assert report["num_images"] == NUM_VAL and report["num_attacked"] == 200
    for row in report["rows"]:
        more = row["more"]
        assert more["corrupted_top1"] == row["top1"] and more["corrupted_nll"] == pytest.approx(
            row["nll"]
        )  # as the copies are the set
        assert report["corrupted"][row["name"]]["fog"].keys() == {"1", "3"} and report["corrupted"][row["name"]][
            "snow"
        ].keys() == {"1"}
        assert more["fgsm_top1"] <= row["top1"] + 0.05 and more["pgd_top1"] <= row["top1"] + 0.05  # of 200 images
        assert 200 * more["pgd_top1"] == pytest.approx(round(200 * more["pgd_top1"]))
        assert more["ood_train_auroc_max_softmax"] == pytest.approx(0.5, abs=0.06)  # more images of the same kind
        assert more["ood_train_fpr95_entropy"] == pytest.approx(0.95, abs=0.05)
        assert more["scaled_nll"] < row["nll"] + 0.01 and more["temperature"] > 0
        assert sum(each["num_images"] for each in report["reliability"][row["name"]]) == NUM_VAL
    assert report["mask_overlaps"][0][1] == report["mask_overlaps"][1][0] < 1 and report["disagreements"][0][0] == 0


def test_the_results_can_be_viewed_offline(whole: Path) -> None:
    page = (whole / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|<script|https?://", page)
    assert page.count("data:image/png;base64,") == len(list((whole / "figures").glob("*.png"))) == 6
    assert {path.stem for path in (whole / "figures").glob("*.pdf")} == {
        "overview",
        "reliability",
        "ensemble_size",
        "pairs",
        "flops",
        "corruptions",
    }
    for wanted in ("superposition-mean", "PGD top-1 %", "AUROC % entropy", "content sha256"):
        assert wanted in page
    table = (whole / "table.txt").read_text()
    assert max(map(len, table.splitlines())) <= 100 and "against train" in table and "corrupted top-1 %" in table
    assert [ref.provenance.method for ref in TicketStore(whole).list()] == ["superposition-mean"]
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    children = {record["child"]: record["metrics"] for record in records if "child" in record}
    assert list(children) == ["ticket-0", "ticket-1", "superposition-mean", "ensemble-2"]
    assert {"eval/adaptive_ece", "eval/corrupted_ece", "eval/pgd_top1", "eval/ood_train_auroc_entropy"} <= children[
        "ensemble-2"
    ].keys()


def same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    numbers = {key: value for key, value in other.items() if not isinstance(value, str | dict)}
    return all(row[key] == pytest.approx(value, rel=1e-4, abs=1e-6) for key, value in numbers.items())


def test_two_ranks_of_deepspeed_and_other_file_names_give_the_same_numbers(whole: Path, folder: Path) -> None:
    (folder / "renamed" / "tickets").mkdir(parents=True)
    for index, name in ((0, "z"), (1, "b")):
        shutil.copy(
            folder / "a" / "tickets" / f"ticket-00{index}.safetensors",
            folder / "renamed" / "tickets" / f"{name}.safetensors",
        )
    asked = arguments(folder, folder / "two", "--recalibrate", f"{folder}/data/train.beton", tickets=("renamed",))
    run(command("deepspeed", EVALUATE, asked), log=folder / "two.log")
    rows, others = (json.loads((path / "report.json").read_text())["rows"] for path in (whole, folder / "two"))
    assert [row["name"] for row in rows] == [row["name"] for row in others]
    assert all(same(row, other) for row, other in zip(rows, others, strict=True))


def test_runs_together_with_a_dense_reference_one_by_url_under_torchrun(whole: Path, folder: Path) -> None:
    """On two ranks, with a superposition that is chosen by held-out images."""
    train = folder / "data" / "train.beton"
    asked = arguments(folder, folder / "together", "--recalibrate", str(train), tickets=("a", "b", "dense"))
    asked[asked.index(f"{folder}/b/tickets")] = f"local://{folder}/b/tickets/"  # a URL for fsspec
    asked += ["evaluation.superposition=greedy_soup", f"evaluation.held_out={train}", "evaluation.held_out_images=300"]
    text = run(command("torchrun", EVALUATE, asked), log=folder / "together.log")
    report = json.loads((folder / "together" / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [
        *("a-ticket-0", "a-ticket-1", "b-ticket-0", "b-ticket-1", "dense-dense-0"),
        *("a-superposition-greedy_soup", "b-superposition-greedy_soup", "ensemble-2", "ensemble-3", "ensemble-4"),
    ]
    assert same(rows["a-ticket-1"], json.loads((whole / "report.json").read_text())["rows"][1])
    assert rows["dense-dense-0"]["kind"] == "dense" and rows["dense-dense-0"]["density"] == 1
    assert (
        rows["ensemble-3"]["training_flops_ratio"] == 0.5 + 0.25
        and rows["ensemble-4"]["training_flops_ratio"] == 0.5 + 0.5
    )  # both runs
    assert (
        report["tickets"] == ["a-ticket-0", "a-ticket-1", "b-ticket-0", "b-ticket-1"] and report["run"]["seed"] == "1 3"
    )
    assert rows["a-superposition-greedy_soup"]["num_members"] in (1, 2)
    for run_name in ("a", "b"):
        num_members = rows[f"{run_name}-superposition-greedy_soup"]["num_members"]
        which = "ticket [01]" if num_members == 1 else "tickets 0, 1"
        assert re.search(rf"{run_name}-superposition-greedy_soup of {which}: recalibrating", text)
    assert "dense-dense-0" in text
    assert f"chosen with {train}" in (folder / "together" / "report.html").read_text()
    (copied,) = set(re.findall(r"b/tickets/?: 2 files copied to (\S+)", text))
    assert not Path(copied).exists() and re.search(rf"^tickets .* local://{folder}/b/tickets/ ", text, re.MULTILINE)


def test_every_rule_on_the_same_tickets(
    whole: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(superposition, "SETTINGS", [(True, "global", True), (True, "layer", False)])
    files = [
        "--data",
        f"{folder}/data/val.beton",
        "--recalibrate",
        f"{folder}/data/train.beton",
        "--json",
        f"{tmp_path}/rules.json",
    ]
    chosen = ["evaluation.held_out_images=50", "evaluation.coefficients=[0.5]"]
    monkeypatch.setattr(sys, "argv", ["superposition", "--tickets", f"{folder}/a/tickets", *files, *SMALL, *chosen])
    superposition.main()
    rows = json.loads((tmp_path / "rules.json").read_text())
    assert [row["rule"] for row in rows] == ["ticket 0", "ticket 1", *(rule for rule in RULES for _ in range(2))]
    report = json.loads((whole / "report.json").read_text())["rows"]
    for row, other in zip(rows[:3], report[:3], strict=True):  # the tickets, and their mean
        assert row["nll"] == pytest.approx(other["nll"], rel=1e-4) and row["top1"] == pytest.approx(other["top1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| rule | global, after each | layer, once |" and lines[
        4
    ] == f"| `mean` | {100 * rows[2]['top1']:.2f} (2) | " + (f"{100 * rows[3]['top1']:.2f} (2) |")


def test_a_folder_of_images_gives_the_numbers_of_the_file_beside_an_imported_network(whole: Path, folder: Path) -> None:
    """The imported one is the second ticket as a dense state_dict, and has its numbers."""
    state = decode(folder / "a" / "tickets" / "ticket-001.safetensors").state
    torch.save({"state_dict": state}, folder / "published.pth")
    published = str(folder / "published.safetensors")
    name, args = RESNET
    asked = ["--model", name, "--model-args", json.dumps(args), "--like", f"{folder}/a", "--output", published]
    assert tickets_command(["import", str(folder / "published.pth"), *asked]) == 0
    tables = read_tables(folder / "data" / "val.beton")
    content = np.fromfile(folder / "data" / "val.beton", np.uint8)
    for index, sample in enumerate(tables.samples):
        path = folder / "images" / str(sample["label"]) / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        start = int(sample["image"]["pointer"])
        Image.fromarray(content[start : start + 28 * 28 * 3].reshape(28, 28, 3)).save(path)
    asked = [
        "--tickets",
        f"{folder}/a/tickets",
        published,
        "--data",
        f"{folder}/images",
        "--other-class-list",
        "--output",
        f"{folder}/of-images",
        *SMALL,
    ]
    run(command("python", EVALUATE, [*asked, *SMALL]), cwd=folder, log=folder / "of-images.log")
    rows, others = (json.loads((path / "report.json").read_text())["rows"] for path in (whole, folder / "of-images"))
    by_name = {row["name"]: row for row in others}
    same_as = {"a-ticket-0": 0, "a-ticket-1": 1, "published-ticket-0": 1, "ensemble-2": 3}
    assert list(by_name) == [*list(same_as)[:3], "ensemble-2", "ensemble-3"]
    for name, number in same_as.items():
        for key in ("top1", "nll", "ece", "density"):
            assert by_name[name][key] == pytest.approx(rows[number][key], rel=1e-4), (name, key)
    assert by_name["published-ticket-0"]["training_flops_ratio"] is None


def test_the_last_ticket_of_every_run(folder: Path) -> None:
    runs = inputs.open_runs([folder / name / "tickets" for name in ("a", "b", "dense")], use="last")
    assert [(run.label, [ref.index for ref in run.refs], run.is_dense) for run in runs] == [
        ("a", [1], False),
        ("b", [1], False),
        ("dense", [0], True),
    ]


@pytest.mark.parametrize(
    ("num_damaged", "message"),
    [
        (0, "contains no intact ticket"),
        (
            1,
            "contains no intact ticket; the only candidate is unusable: {first}: is not an intact ticket: it is",
        ),
        (
            3,
            "contains no intact ticket; all 3 candidates are unusable; the first: {first}: is not an intact ticket",
        ),
    ],
)
def test_a_folder_without_an_intact_ticket(num_damaged: int, message: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"ticket-{index:03d}.safetensors" for index in range(3)]
    for path in paths[:num_damaged]:
        path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        inputs.open_runs([tmp_path])
    assert error.value.what.startswith(f"{tmp_path}: {message.format(first=paths[0])}")
    assert error.value.do.startswith("copy the tickets again" if num_damaged else "pass a run, a folder that contains")


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"--tickets": "/nowhere"}, 65, "--tickets /nowhere: does not exist"),
        ({"--data": "/nowhere.beton"}, 65, "/nowhere.beton: does not exist"),
        ({"--tickets": "{folder}/data"}, 65, "contains no intact ticket"),
        ({"--ood": "{folder}/source"}, 65, "/source: is a folder, but {folder}/data/val.beton is a file"),
        (
            {"--data": "{folder}/source", "--recalibrate": "{folder}/data/train.beton"},
            65,
            "/data/train.beton: is a file, but",
        ),
        ({"--corrupted": "{folder}/data"}, 65, "is not named <corruption>-<severity>.beton"),
        ({"--corrupted": "{folder}/a"}, 65, "contains no corrupted sets"),
        ({"--epsilon": "nan"}, 64, "'nan' is not a number above 0"),
        ({"--pgd-steps": "0"}, 64, "'0' is not a whole number"),
        ({"--use": "best"}, 64, "invalid choice: 'best'"),
        ({"--tickets": "memory://nowhere/tickets"}, 65, "memory://nowhere/tickets: does not exist"),
        ({"--tickets": "nowhere://tickets"}, 69, "nowhere://tickets: Protocol not known: nowhere"),
        (
            {
                "--recalibrate": "{folder}/data/train.beton",
                "evaluation.superposition=greedy_soup": "",
                "evaluation.held_out={folder}/data/val.beton": "",
            },
            65,
            "val.beton is also data.val",
        ),
        ({"--data": None}, 64, "the following arguments are required: --data"),
        ({"evaluation.batchs=3": ""}, 64, "unknown key 'evaluation.batchs'"),
        ({"data.eval_resolution=0": ""}, 64, "data.eval_resolution: expected a whole number > 0, got 0"),
        (
            {"--tickets": "{folder}/vit", "data.eval_resolution=48": ""},
            64,
            "data.eval_resolution: timm/vit_tiny_patch16_224 does not run on images of 3×48×48 pixels: ",
        ),
        ({"data.val=other.beton": ""}, 64, "data.val: cannot be set this way in an evaluation; do: use --data"),
        (
            {"data.train=other.beton": ""},
            64,
            "data.train: cannot be set this way in an evaluation; do: use --recalibrate",
        ),
        ({"output_dir=elsewhere": ""}, 64, "output_dir: cannot be set this way in an evaluation; do: use --output"),
        ({"data.order=quasi_random": ""}, 64, "data.order: is not used in an evaluation"),
        ({"model.num_classes=3": ""}, 64, "model.num_classes: is not used in an evaluation"),
        ({"--output": "{folder}/whole"}, 73, "already holds a report"),
        ({"--tickets": "{folder}/bad"}, 64, "data.mean: the tickets were trained with different values"),
        ({"--tickets": "{folder}/old"}, 64, "data.eval_resolution: is missing from the provenance"),
        ({"--tickets": "{folder}/hostile"}, 64, "must not contain ${{…}}"),
        ({"--tickets": "{folder}/foreign"}, 65, "its class list differs from the one the tickets were trained on"),
    ],
)
def test_bad_input_is_one_line_and_early(
    folder: Path, whole: Path, tmp_path: Path, changed: dict[str, str | None], code: int, message: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(evaluate_cli, "log_to_terminal", lambda: None)
    digests = ("d", str(verify(folder / "data" / "val.beton").sidecar["classes_sha256"]))
    if changed.get("--tickets") == "{folder}/bad" and not (folder / "bad").exists():
        make_tickets(folder / "bad", [1], digests=digests)
        other = decode(folder / "bad" / "ticket-000.safetensors")
        provenance = dataclasses.replace(other.provenance, index=1, preprocessing=PREPROCESSING | {"mean": [0.0] * 3})
        TicketStore(folder / "bad", owner="run-1").save(dataclasses.replace(other, provenance=provenance))
    if changed.get("--tickets") == "{folder}/old":
        make_tickets(folder / "old", [1], digests=digests, preprocessing={})
    if changed.get("--tickets") == "{folder}/hostile":
        make_tickets(
            folder / "hostile", [1], digests=digests, preprocessing=PREPROCESSING | {"augmentation": "${oc.env:HOME}"}
        )
        changed = changed | {"--recalibrate": "{folder}/data/train.beton"}
    if changed.get("--tickets") == "{folder}/vit":
        vit = ("timm/vit_tiny_patch16_224", {"img_size": 32, "depth": 1})
        make_tickets(folder / "vit", [1], digests=digests, network=vit)
    if changed.get("--tickets") == "{folder}/foreign":
        make_tickets(folder / "foreign", [1], digests=("d", "other classes"))
    asked = {
        "--tickets": "{folder}/a/tickets",
        "--data": "{folder}/data/val.beton",
        "--output": str(tmp_path / "out"),
    } | changed
    given = [
        part.format(folder=folder) for key, value in asked.items() if value is not None for part in (key, value) if part
    ]
    assert evaluate_cli.main(lambda *_: pytest.fail("too late"), given) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ERROR[{code}] rank=0 ") and message.format(folder=folder) in line
    assert not (tmp_path / "out").exists()


def test_help_comes_before_anything_heavy() -> None:
    code = "import sys; from launchers.evaluate_cli import parse; parse(['--nothing'])"
    code = f"try:\n    {code}\nexcept Exception: print({{'torch', 'ffcv', 'mlflow'}} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
