"""The inputs of an evaluation before any ticket is opened: sets of images, and their loaders."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data_prep.images import ImageOptions
from data_prep.writer import write_beton
from launchers.evaluate import corrupted_sets
from pipeline.config.load import load_config
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import EvalLoader, open_eval_loader
from pipeline.datasets.sets import DataSets
from pipeline.datasets.sidecar import BetonInfo
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation import inputs
from pipeline.tickets.provenance import Provenance
from pipeline.training.selection import preprocessing_of


class Framed:
    """Three black images of 16 × 16 pixels with a white border of one pixel; labels 0, 1, 0."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        image = np.full((16, 16, 3), 255, np.uint8)
        image[1:-1, 1:-1] = index
        return image, index % 2


def write(path: Path, **source: Any) -> BetonInfo:
    path.parent.mkdir(exist_ok=True)
    return write_beton(
        path, Framed(), classes=["a", "b"], options=ImageOptions(write_mode="raw"), source=source, num_workers=1
    )


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> BetonInfo:
    return write(tmp_path_factory.mktemp("clean") / "val.beton", kind="caller")


def open_sets(clean: BetonInfo, corrupted: Path) -> DataSets:
    return inputs.open_sets(clean.path, train=None, corrupted=corrupted)


def test_images_that_are_cropped_already_keep_their_border(clean: BetonInfo, tmp_path: Path) -> None:
    write(tmp_path / "c" / "blur-1.beton", kind="cifar-c")
    write(tmp_path / "c" / "fog-1.beton", kind="imagenet-c")
    write(tmp_path / "c" / "snow-1.beton", kind="corrupted", crop=16)
    write(tmp_path / "c" / "snow-2.beton", kind="corrupted", crop=None)
    data = DataConfig(
        train="",
        val=str(clean.path),
        eval_resolution=16,
        eval_ratio=0.875,
        num_workers=1,
        mean=[0.0] * 3,
        std=[1.0] * 3,
    )

    @functools.cache
    def loader_of(eval_ratio: float) -> EvalLoader:
        cropping = dataclasses.replace(data, eval_ratio=eval_ratio)
        return open_eval_loader(clean.path, cropping, batch=2, device=torch.device("cpu"), channels_last=False)

    sets = open_sets(clean, tmp_path / "c")
    found = {
        (name, severity): max(float(images.max()) for _, images, _ in loader.batches())
        for name, severity, loader in corrupted_sets(sets, loader_of, eval_ratio=0.875)
    }
    assert found == {("blur", 1): 2, ("fog", 1): 255, ("snow", 1): 255, ("snow", 2): 2}


def test_an_evaluation_resizes_as_the_tickets_say(clean: BetonInfo, tmp_path: Path) -> None:
    """Tickets record ``data.eval_resize`` where it is not neutral; without it they keep their bytes of before."""

    def tickets(*overrides: str) -> Any:
        config = load_config("imagenet_r50_s90", ["data.train=t", "data.val=v", "output_dir=o", *overrides])
        known = make_provenance(preprocessing=preprocessing_of(config))
        return SimpleNamespace(refs=[SimpleNamespace(provenance=known, path=tmp_path)])

    def configured(*runs: Any, overrides: Sequence[str] = ()) -> str:
        return inputs.configure(runs, DataSets(None, clean), output=tmp_path, overrides=overrides).data.eval_resize

    before, after = tickets(), tickets("data.eval_resize=torchvision")
    assert "eval_resize" not in before.refs[0].provenance.preprocessing
    assert (configured(before), configured(after)) == ("area", "torchvision")
    assert configured(before, overrides=["data.eval_resize=torchvision"]) == "torchvision"
    with pytest.raises(ConfigError, match=r"data\.eval_resize: the tickets were trained with different values: area"):
        configured(before, after)


def make_provenance(**changes: Any) -> Provenance:
    kinds: dict[Any, Any] = {"int": 2, "float": 1.0, "str": "cifar_resnet8"}
    values = {each.name: kinds.get(each.type, {}) for each in dataclasses.fields(Provenance)}
    return Provenance(**(values | changes))


def test_corrupted_sets_of_another_set_are_refused(clean: BetonInfo, tmp_path: Path) -> None:
    write(tmp_path / "c" / "fog-1.beton", kind="corrupted", crop=None, of=clean.digest)
    write(tmp_path / "c" / "snow-1.beton", kind="imagenet-c")
    assert len(open_sets(clean, tmp_path / "c").corrupted) == 2
    write(tmp_path / "c" / "fog-2.beton", kind="corrupted", crop=None, of="another")
    with pytest.raises(DataError, match=r"fog-2\.beton: was made from a different set than \S+/val\.beton"):
        open_sets(clean, tmp_path / "c")


@pytest.mark.parametrize(
    ("folders", "labels"),
    [
        (["run"], [""]),
        (["a/tickets", "b/tickets"], ["a", "b"]),
        (["x/run", "y/run", "run-2"], ["run-1", "run-3", "run-2"]),
        (["run-2", "x/run", "y/run", "run-3"], ["run-2", "run-4", "run-5", "run-3"]),
        (["Run!", "run", "run-1"], ["run-2", "run-3", "run-1"]),
    ],
)
def test_runs_have_names_of_their_own(folders: list[str], labels: list[str]) -> None:
    assert inputs._labels([Path("/somewhere", folder) for folder in folders]) == labels
