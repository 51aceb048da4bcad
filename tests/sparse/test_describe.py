from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers.describe import DESCRIBED_METHODS, main
from pipeline import models
from pipeline.models import registry
from pipeline.sparse.describe import describe
from pipeline.sparse.sparsifier import Sparsifier
from pipeline.sparse.strategy import METHODS

ROOT = Path(__file__).parents[2]
FACTS = json.loads((ROOT / "tests/conformance.json").read_text())["resnet50"]


def run(capsys: pytest.CaptureFixture[str], arguments: str) -> dict[str, Any]:
    assert main([*arguments.split(), "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_command_reproduces_the_published_ratio() -> None:
    arguments = ["--model", "resnet50", "--density", "0.1", "--distribution", "erk", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "launchers.describe", *arguments], capture_output=True, text=True, cwd=ROOT, check=True
    )
    result = json.loads(done.stdout)
    assert (result["weights"], result["active"]) == (FACTS["sparse_weights"], FACTS["erk_sparsity_0.9"]["total_active"])
    assert result["density"] == result["active"] / result["weights"]
    assert round(result["inference_flops_ratio"], 2) == 0.24
    assert len(result["layers"]) == FACTS["sparse_layers"]
    first = result["layers"][0]
    macs = 9408 * 112 * 112
    assert first == {
        "name": "conv1.weight",
        "shape": [64, 3, 7, 7],
        "weights": 9408,
        "active": 3951,
        "density": 3951 / 9408,
        "macs": macs,
    }
    assert result["dense_macs"] == sum(layer["macs"] for layer in result["layers"]) == FACTS["dense_macs"]
    for key in ("weights", "active"):
        assert result[key] == sum(layer[key] for layer in result["layers"])


@pytest.mark.parametrize("sparsity", [0.8, 0.9])
@pytest.mark.parametrize(
    ("method", "interval", "fact"),
    [
        ("static", 100, "SET(3f_S/3f_D)"),
        ("set", 100, "SET(3f_S/3f_D)"),
        ("rigl", 100, "RigL_dT100"),
        ("rigl", 800, "RigL_dT800"),
        ("rigl_itop", 4000, "RigL_dT4000"),
        ("snfs", 100, "SNFS((2f_S+f_D)/3f_D)"),
    ],
)
def test_resnet50_is_as_published(
    capsys: pytest.CaptureFixture[str], sparsity: float, method: str, interval: int, fact: str
) -> None:
    facts = FACTS[f"erk_sparsity_{sparsity}"]
    result = run(capsys, f"--model resnet50 --density {1 - sparsity} --method {method} --update-interval {interval}")
    assert result["active"] == facts["total_active"]
    assert result["inference_flops_ratio"] == pytest.approx(
        facts["inference_flops_ratio"], rel=1e-4
    )  # counts are whole weights
    assert result["train_flops_ratio"] == pytest.approx(facts["train_flops_ratio"][fact], rel=1e-4)


def test_every_method_of_constant_density_and_random_masks_is_described() -> None:
    assert set(METHODS) - set(DESCRIBED_METHODS) == {"dense", "granet", "gmp", "acdc"} | {
        "magnitude_init",
        "snip",
        "grasp",
        "synflow",
    }


def test_counts_of_a_structure_are_those_of_the_masks(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--model cifar_resnet8 --num-classes 10 --density 0.1 --method srigl")
    model = models.build("cifar_resnet8", num_classes=10, seed=0)
    sparsifier = Sparsifier(model, torch.optim.SGD(model.parameters(), lr=0.1), "srigl", density=0.1, seed=0)
    counts = {layer["name"]: layer["active"] for layer in result["layers"]}
    assert counts == {name: int(mask.sum()) for name, mask in sparsifier.masks.items()}
    assert sum(counts.values()) == result["active"] != round(0.1 * result["weights"])
    macs = {layer["name"]: layer["macs"] for layer in result["layers"]}
    active_macs = sum(macs[name] * count / sparsifier.masks[name].numel() for name, count in counts.items())
    assert result["inference_flops_ratio"] == pytest.approx(active_macs / result["dense_macs"])


def test_layers_kept_dense_count_in_the_flops_alone(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--model cifar_resnet8 --num-classes 10 --density 0.5 --dense-layers stem.weight blocks.*")
    assert [(layer["name"], layer["weights"], layer["active"], layer["macs"]) for layer in result["layers"]] == [
        ("fc.weight", 640, 320, 640)
    ]
    assert (result["weights"], result["active"], result["density"]) == (640, 320, 0.5)
    assert all(layer["density"] == 1 and layer["active"] == layer["weights"] for layer in result["dense_layers"])
    assert result["inference_flops_ratio"] == pytest.approx(1 - 320 / result["dense_macs"])


def test_what_stays_dense_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model vit_b_16 --density 0.1"
    result = run(capsys, arguments)
    (position,) = result["dense_weights"]
    assert (position["name"], position["num_values"]) == ("encoder.pos_embedding", 197 * 768)
    dense = result["parameters"] - result["weights"]
    assert result["network_density"] == (result["active"] + dense) / result["parameters"]
    assert main(arguments.split()) == 0
    said = "1 weight stays dense (151,296 values): encoder.pos_embedding (a parameter of Encoder)"
    kept = f"{result['active'] + dense:,} of the dense network's {result['parameters']:,}"
    assert f"{kept}; network density {result['network_density']:.4f}; {said}" in capsys.readouterr().out


def test_image_size_classes_and_arguments_reach_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--model vit_b_16 --density 0.5 --image-size 32 --num-classes 10 --model-args image_size=32")
    macs = {layer["name"]: layer["macs"] for layer in result["layers"]}
    assert macs["conv_proj.weight"] == 4 * 768 * 768  # 2×2 patches
    assert (
        macs["encoder.layers.encoder_layer_0.self_attention.in_proj_weight"] == 5 * 3 * 768 * 768
    )  # and the class token
    assert macs["heads.head.weight"] == 7680
    assert (result["model"], result["image_size"], result["num_classes"]) == ("vit_b_16", 32, 10)


def test_a_timm_model(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--model timm/vit_tiny_patch16_224 --density 0.2")
    width, tokens = 192, 197
    assert result["weights"] == 768 * width + 12 * 12 * width * width + width * 1000
    assert result["active"] == round(0.2 * result["weights"])
    assert result["dense_macs"] == 768 * width * 196 + 12 * 12 * width * width * tokens + width * 1000


@pytest.mark.slow
def test_every_network_can_be_described() -> None:
    for name in registry.names():
        description = describe(
            models.outline(name),
            density=0.1,
            distribution="erk",
            image_size=models.image_size(name),
            strategy=METHODS["rigl"],
            update_interval=100,
        )
        assert description.active == round(0.1 * description.weights), name
        assert all(layer.macs > 0 and 0 < layer.active <= layer.weights for layer in description.layers), name
        assert description.dense_macs == sum(layer.macs for layer in description.layers), name
        assert 0 < description.inference_flops_ratio < description.train_flops_ratio < 1, name


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "vgg_c", "--num-classes", "10", "--density", "0.05", "--method", "rigl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "shape", "weights", "active", "density", "MACs"]
    assert lines[1].split() == ["features.0.weight", "64×3×3×3", "1,728", "1,728", "1.0000", "1,769,472"]  # 1728·32·32
    assert lines[18].split() == ["16", "sparse", "layers", "11,307,712", "565,386", "0.0500", "310,973,440"]
    assert len({len(line) for line in lines[:19]}) == 1
    assert lines[20] == "vgg_c, 32×32 pixels, dense: 310,973,440 MACs per image"
    assert lines[22].endswith("of the dense network's (rigl, an update every 100 steps)")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--density 0", "'0' is not a number above 0 and at most 1"),
        ("--density 1.5", "'1.5' is not"),
        ("--density nan", "'nan' is not"),
        ("--density 1e-9", "1e-09 of 25502912 weights is none"),
        ("--model resnet5O", "'resnet5O' is not a model"),
        ("--model alexnet --image-size 32", "does not run on 32×32 pixels"),
        ("--model vit_b_16 --image-size 32", "Wrong image height"),
        ("--image-size 0", "'0' is not a whole number"),
        ("--num-classes -1", "--num-classes"),
        ("--distribution erdos", "invalid choice: 'erdos'"),
        ("--method granet", "invalid choice: 'granet'"),
        ("--dense-layers nothing.*", "matches 'nothing.*'"),
        ("--dense-layers * --distribution uniform_dense_first", "no sparse layer is left"),
        ("--model-args width", "'width' is not KEY=VALUE"),
        ("--model-args weights=DEFAULT", "model.args: resnet50"),
    ],
)
def test_what_cannot_be_described_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, told: str
) -> None:
    assert main(["--model", "resnet50", "--density", "0.1", *arguments.split()]) == 64
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("ERROR[64] ")
    assert told in output.err
    assert output.err.count("\n") == 1


def test_a_refusal_comes_before_anything_heavy_is_imported() -> None:
    code = "import sys; from launchers.describe import main; code = main(sys.argv[1:]); "
    code += "sys.exit(1 if 'torch' in sys.modules else code)"
    arguments = ["--model", "resnet50", "--density", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (64, 1)
