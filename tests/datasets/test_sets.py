"""The data sets of a run: each file is verified once, to the configured level, and all of them must fit together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_prep.images import ImageOptions
from data_prep.writer import write_beton
from pipeline.config.load import load_config
from pipeline.config.schema import Config
from pipeline.datasets import sets, sidecar
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import DataError


class Squares:
    def __init__(self, shade: int) -> None:
        self.shade = shade

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((8, 8, 3), self.shade + index, np.uint8), index % 2


def write(path: Path, shade: int, classes: list[str]) -> BetonInfo:
    options = ImageOptions(write_mode="raw")
    return write_beton(path, Squares(shade), classes=classes, options=options, source={}, num_workers=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "train.beton", 10, ["a", "b"])
    write(folder / "val.beton", 20, ["a", "b"])
    write(folder / "other.beton", 30, ["a", "c"])
    write(folder / "three.beton", 40, ["a", "b", "c"])
    return folder


def configured(folder: Path, *overrides: str) -> Config:
    paths = [f"data.train={folder}/train.beton", f"data.val={folder}/val.beton", "model.num_classes=2"]
    return load_config("fashion_mnist_s90", [*paths, *overrides])


SELECTING = ("tickets.select=best", "evaluation.every=1 epoch")


def held_out(folder: Path, name: str) -> tuple[str, str]:
    return "evaluation.superposition=greedy_soup", f"evaluation.held_out={folder}/{name}.beton"


@pytest.mark.parametrize(("is_verified", "structures"), [("true", 2), ("false", 0)])
def test_each_file_is_verified_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_verified: str, structures: int
) -> None:
    hashed, checked = [], []
    hash_tables, check_structure = sidecar._tables_sha256, sidecar.check_structure
    monkeypatch.setattr(sidecar, "_tables_sha256", lambda path, of: hashed.append(path.name) or hash_tables(path, of))
    monkeypatch.setattr(sidecar, "check_structure", lambda *given: checked.append(1) or check_structure(*given))
    config = configured(folder, *held_out(folder, "train"), f"data.verify={is_verified}")
    found = sets.open_data_sets(config)
    assert sorted(hashed) == ["train.beton", "val.beton"] and len(checked) == structures
    assert found.held_out is found.train is not None
    assert [info.path.name for info in (found.train, found.val)] == ["train.beton", "val.beton"]


def test_a_held_out_set_is_opened_when_a_rule_chooses_with_it(folder: Path) -> None:
    assert sets.open_data_sets(configured(folder)).held_out is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (held_out(Path("{}"), "val"), "is also data.val"),
        (held_out(Path("{}"), "other"), "label 1 is 'c' in {}/other.beton, but 'b' in {}/val.beton"),
        ((*SELECTING, "evaluation.held_out={}/val.beton"), "is also data.val"),
        ((*SELECTING, "evaluation.held_out={}/train.beton"), "is the training set, expected other images for tickets"),
        (held_out(Path("{}"), "none"), "{}/none.beton: does not exist"),
        (("data.val={}/other.beton",), "label 1 is 'b' in {}/train.beton, but 'c' in {}/other.beton"),
        (("data.train={}/three.beton",), "{}/three.beton has 3 classes, but {}/val.beton has 2"),
    ],
)
def test_sets_that_do_not_fit_together_are_refused(folder: Path, overrides: tuple[str, ...], reason: str) -> None:
    with pytest.raises(DataError) as error:
        sets.open_data_sets(configured(folder, *(text.replace("{}", str(folder)) for text in overrides)))
    assert reason.replace("{}", str(folder)) in str(error.value)
