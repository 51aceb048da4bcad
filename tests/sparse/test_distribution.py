from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pipeline import models
from pipeline.sparse.distribution import DISTRIBUTIONS, er, erk, exact_counts, random_masks, uniform
from pipeline.sparse.flops import dense_flops, layer_macs, rigl_flops_per_sample, sparse_flops
from pipeline.sparse.layers import sparse_weights

FACTS = json.loads((Path(__file__).parents[1] / "conformance.json").read_text())["resnet50"]
SPARSITIES = (0.8, 0.9, 0.95)


@pytest.fixture(scope="module")
def resnet50() -> torch.nn.Module:
    return models.build("resnet50")


@pytest.fixture(scope="module")
def shapes(resnet50: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in sparse_weights(resnet50).items()}


def test_resnet50_has_the_published_sparse_layers(
    resnet50: torch.nn.Module, shapes: dict[str, tuple[int, ...]]
) -> None:
    assert len(shapes) == FACTS["sparse_layers"]
    assert sum(math.prod(shape) for shape in shapes.values()) == FACTS["sparse_weights"]
    assert sum(layer_macs(resnet50, (3, 224, 224)).values()) == FACTS["dense_macs"]


@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_is_the_published_distribution(
    sparsity: float, shapes: dict[str, tuple[int, ...]], resnet50: torch.nn.Module
) -> None:
    facts = FACTS[f"erk_sparsity_{sparsity}"]
    densities = erk(shapes, 1 - sparsity)
    assert densities == pytest.approx(facts["layer_density"], abs=1e-8)
    assert [name for name, density in densities.items() if density == 1] == facts["dense_layers"]
    counts = exact_counts(shapes, densities, 1 - sparsity)
    assert sum(counts.values()) == facts["total_active"]
    masks = random_masks(shapes, counts, seed=0)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == counts
    macs = layer_macs(resnet50, (3, 224, 224))
    f_sparse, f_dense = sparse_flops(macs, masks), dense_flops(macs)
    assert f_sparse / f_dense == pytest.approx(
        facts["inference_flops_ratio"], rel=1e-4
    )  # counts are whole weights, the fact is not
    for interval in (100, 800, 1000, 4000):
        ratio = rigl_flops_per_sample(facts["inference_flops_ratio"] * f_dense, f_dense, interval) / (3 * f_dense)
        assert ratio == pytest.approx(facts["train_flops_ratio"][f"RigL_dT{interval}"], rel=1e-9)


def test_two_layers_by_hand() -> None:
    # ERK: raw = (2+2)/4 = 1 and (4+4)/16 = 1/2; eps·(4·1 + 16·1/2) = 0.5·20 -> eps = 10/12; densities 5/6 and 5/12.
    assert erk({"a": (2, 2), "b": (4, 4)}, 0.5) == pytest.approx({"a": 5 / 6, "b": 5 / 12})
    # At density 0.9 layer a would need eps = 18/12 > 1: it is dense, and b has the rest: (18 − 4)/16.
    assert erk({"a": (2, 2), "b": (4, 4)}, 0.9) == pytest.approx({"a": 1.0, "b": 14 / 16})
    # ER looks at channels only: raw = (2+3)/6 for a 3×3 kernel too.
    densities = er({"a": (2, 3, 3, 3), "b": (2, 3)}, 0.25)
    assert densities["a"] == pytest.approx(densities["b"])
    assert uniform({"a": (2, 2), "b": (4, 4)}, 0.3) == {"a": 0.3, "b": 0.3}


def test_the_earlier_of_equal_layers_gets_the_extra_weight() -> None:
    shapes = {"a": (5,), "b": (5,), "c": (5,)}
    assert exact_counts(shapes, dict.fromkeys(shapes, 0.5), 0.5) == {"a": 3, "b": 3, "c": 2}  # 2.5 each, 8 in all


@pytest.mark.parametrize("name", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.999, 1.0])
def test_counts_are_exact_for_every_distribution(name: str, density: float) -> None:
    shapes = {"stem": (16, 3, 3, 3), "one": (1, 1), "wide": (64, 32, 1, 1), "fc": (10, 64)}
    counts = exact_counts(shapes, DISTRIBUTIONS[name](shapes, density), density)
    sizes = {key: math.prod(shape) for key, shape in shapes.items()}
    assert sum(counts.values()) == round(density * sum(sizes.values()))
    assert all(0 <= counts[key] <= sizes[key] for key in shapes)
