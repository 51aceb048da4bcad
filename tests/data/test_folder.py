"""The folder loader: the same pixels as ffcv gives, without ffcv; failures are one line."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config.schema import DataConfig
from pipeline.data.folder import FolderSource
from pipeline.data.loaders import TrainLoader, open_eval_loader, open_train_loader
from pipeline.datasets.sets import inspect
from pipeline.datasets.sidecar import check_num_classes
from pipeline.errors import DataError

CPU = torch.device("cpu")
NUM_IMAGES = 24


def pixels(index: int) -> np.ndarray:
    random = np.random.default_rng(index)
    height, width = random.integers(20, 41, 2)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 PNGs with sides of 20 to 40 pixels in three classes, in the order of their numbers."""
    root = tmp_path_factory.mktemp("images")
    for index in range(NUM_IMAGES):
        name = root / "abc"[index // 8] / f"{index:02}.png"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels(index)).save(name)
    return root


def data_config(path: Path, **changes: object) -> DataConfig:
    settings = {"num_workers": 2, "train_resolution": 16, "eval_resolution": 16, "batch_timeout_seconds": 60} | changes
    return DataConfig(loader="folder" if path.is_dir() else "ffcv", train=str(path), val=str(path), **settings)  # type: ignore[arg-type]


def train_loader(path: Path, **changes: object) -> TrainLoader:
    return open_train_loader(path, data_config(path, **changes), global_batch=6, seed=2, device=CPU, channels_last=True)


def test_a_folder_gives_the_pixels_of_the_file_written_from_it(folder: Path, tmp_path: Path) -> None:
    from data_prep.images import ImageOptions
    from data_prep.writer import write_beton

    images = [(pixels(index), index // 8) for index in range(NUM_IMAGES)]
    info = write_beton(
        tmp_path / "raw.beton", images, classes=["a", "b", "c"], options=ImageOptions(), source={}, num_workers=1
    )
    assert (inspect(folder).classes, inspect(folder).num_samples) == (info.classes, info.num_samples)
    assert inspect(folder).sidecar["classes_sha256"] == info.sidecar["classes_sha256"]

    for ours, theirs in zip(
        train_loader(folder).steps(1, 7), train_loader(info.path, num_workers=1).steps(1, 7), strict=True
    ):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1][0], theirs[1][0])
        assert torch.equal(ours[1][1], theirs[1][1])
    evaluations = [
        list(
            open_eval_loader(path, data_config(path, num_workers=1), batch=10, device=CPU, channels_last=True).batches()
        )
        for path in (folder, info.path)
    ]
    for batches in zip(*evaluations, strict=True):
        for of_folder, of_file in zip(*batches, strict=True):
            assert torch.equal(of_folder, of_file)


def test_evaluation_can_have_torchvisions_pixels(tmp_path: Path) -> None:
    """Photographs, through both loaders, against ImageFolder with Resize and CenterCrop: equal to the bit."""
    from skimage import data as photographs
    from sklearn.datasets import load_sample_image
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    from data_prep.images import ImageOptions
    from data_prep.writer import write_beton

    large = load_sample_image("china.jpg")
    images = [large, photographs.chelsea(), np.ascontiguousarray(large[:300, :301].transpose(1, 0, 2)), pixels(3)]
    (tmp_path / "images" / "a").mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "images" / "a" / f"{index}.png")
    options = {"classes": ["a"], "source": {}, "num_workers": 1}
    raw = write_beton(tmp_path / "raw.beton", [(each, 0) for each in images], options=ImageOptions(), **options)
    jpeg = ImageOptions("jpg", jpeg_quality=100)  # of which only what the square needs is decoded
    coded = write_beton(tmp_path / "jpg.beton", [(each, 0) for each in images[:2]], options=jpeg, **options)

    transform = Compose([Resize(256), CenterCrop(224), PILToTensor()])
    expected = torch.stack([image for image, _ in ImageFolder(tmp_path / "images", transform)])  # type: ignore[arg-type]
    settings = {"eval_resize": "torchvision", "eval_resolution": 224, "mean": [0.0] * 3, "std": [1.0] * 3}
    for path in (tmp_path / "images", raw.path):
        data = data_config(path, num_workers=1, **settings)
        loader = open_eval_loader(path, data, batch=2, device=CPU, channels_last=True)
        ours = torch.cat([batch.clone() for _, batch, _ in loader.batches()])
        assert torch.equal(ours, expected.float())
    loader.switch_to(coded.path)
    ours = torch.cat([batch.clone() for _, batch, _ in loader.batches()])
    assert (ours - expected[:2]).abs().mean() < 3  # what JPEG changes; a square that is moved differs by more


def test_a_quota_bounds_the_loader_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, max_workers: int) -> None:
            used.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr("pipeline.data.folder.ThreadPoolExecutor", Pool)
    batches = []
    for quota in (None, 3):
        monkeypatch.setattr("pipeline.limits.cpu_quota", lambda quota=quota: quota)
        batches.append(next(train_loader(folder, num_workers=8).steps(0, 1))[1][0].clone())
    assert used == [8, 3] and torch.equal(*batches)


def test_ffcv_is_not_imported(folder: Path) -> None:
    code = f"""
import sys, torch
from pathlib import Path
from pipeline.data.loaders import open_train_loader
from pipeline.config.schema import DataConfig
data = DataConfig(loader="folder", train_resolution=16, num_workers=1)
device = torch.device("cpu")
loader = open_train_loader(Path({str(folder)!r}), data, global_batch=6, seed=2, device=device, channels_last=True)
assert next(loader.steps(0, 1))[1][0].shape == (6, 3, 16, 16)
sys.exit(str({{"ffcv", "cv2"}} & set(sys.modules)) if {{"ffcv", "cv2"}} & set(sys.modules) else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


def test_pad_crop_flip_and_mixup(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for index in range(4):
        Image.fromarray(np.full((8, 8, 3), 60 * index, np.uint8)).save(tmp_path / "a" / f"{index}.png")
    data = data_config(
        tmp_path,
        augmentation="pad_crop_flip",
        train_resolution=8,
        mean=[30.0] * 3,
        std=[1.0] * 3,
        flip=False,
        mixup=0.3,
    )
    loader = open_train_loader(tmp_path, data, global_batch=4, seed=2, device=CPU, channels_last=False, num_classes=2)
    plain = open_train_loader(
        tmp_path, dataclasses.replace(data, mixup=0.0), global_batch=4, seed=2, device=CPU, channels_last=False
    )
    (_, (mixed, targets)), (_, (images, labels)) = next(loader.steps(5, 6)), next(plain.steps(5, 6))
    assert set(images.unique().tolist()) == {-30.0, 0.0, 30.0, 90.0, 150.0}  # the border is the mean: zero
    assert labels.tolist() == [0, 0, 0, 0]
    from pipeline.data.order import mixing_shares

    share = torch.from_numpy(mixing_shares(2, 5, 4, alpha=0.3)).float()
    for sample, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        expected = share[sample] * images[sample] + (1 - share[sample]) * images[partner]
        assert torch.allclose(mixed[sample], expected, atol=1e-3)
    assert targets.tolist() == [[1.0, 0.0]] * 4
    # two ranks see the same mixtures as one
    loader._world_size = 2
    halves = []
    for rank in range(2):
        loader._rank = rank
        halves.append(next(loader.steps(5, 6))[1][0])
    assert torch.equal(torch.cat(halves), mixed)


def test_failures_are_reported_in_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes((folder / "a" / "00.png").read_bytes()[:200])
    loader = open_eval_loader(tmp_path, data_config(tmp_path), batch=1, device=CPU, channels_last=True)
    with pytest.raises(
        DataError, match=r"evaluation, batch 0: a/x\.jpg \(sample 0\) is truncated, .*; do: repair or remove it"
    ):
        list(loader.batches())
    with pytest.raises(DataError, match=r"is a folder, but data\.loader is 'ffcv'"):
        open_eval_loader(folder, DataConfig(), batch=1, device=CPU, channels_last=True)
    (tmp_path / "a" / "x.jpg").rename(tmp_path / "a" / "x.txt")
    with pytest.raises(DataError, match=r"x\.txt: is not a \.jpg, \.jpeg, \.png file"):
        inspect(tmp_path)
    with pytest.raises(DataError, match="has 3 classes, but the model only 2"):
        check_num_classes(inspect(folder), 2)
    monkeypatch.setattr(
        FolderSource, "_load", lambda *_: time.sleep(0.2)
    )  # six images by two threads: the batch is late, no image is
    stuck = train_loader(folder, batch_timeout_seconds=0.3)
    with pytest.raises(DataError, match=r"epoch 0, batch 0: no batch came within 0\.3 seconds"):
        next(stuck.steps(0, 1))
