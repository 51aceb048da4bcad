"""Corrupted copies: seeded, in the order of the original, and the published layouts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.corrupt import CORRUPTIONS, BetonImages, CorruptedImages, centre_square, package_corrupt, write_corrupted
from data_prep.images import ImageOptions
from data_prep.writer import write_beton
from pipeline.datasets.sidecar import BetonInfo, verify
from pipeline.errors import DataError


class Squares:
    """Grey images of 40 × 30 pixels, each brighter than the one before; labels alternate."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return np.full((40, 30, 3), 20 * index, np.uint8), index % 2


def add_severity(image: np.ndarray, corruption: str, severity: int, seed: int) -> np.ndarray:
    assert image.dtype == np.uint8 and image.flags.c_contiguous
    return image + np.uint8(severity + (seed % 7 if corruption == "fog" else 0))


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clean") / "val.beton"
    write_beton(path, Squares(), classes=["a", "b"], options=ImageOptions(write_mode="raw"), source={}, num_workers=1)
    return path


def write(clean: Path, output: Path, **changes: object) -> list[BetonInfo]:
    options: dict[str, object] = {
        "corruptions": ["fog", "snow"],
        "severities": [1, 3],
        "seed": 0,
        "crop": None,
        "work_side": 32,
    }
    return list(write_corrupted(clean, output, num_workers=1, corrupt=add_severity, **(options | changes)))  # type: ignore[arg-type]


def pixels(path: Path) -> list[int]:
    images = BetonImages.of(path)
    return [int(images[index][0].mean()) for index in range(len(images))]


def test_every_corruption_at_every_severity(clean: Path, tmp_path: Path) -> None:
    infos = write(clean, tmp_path)
    assert [info.path.name for info in infos] == ["fog-1.beton", "fog-3.beton", "snow-1.beton", "snow-3.beton"]
    assert pixels(tmp_path / "snow-3.beton") == [3, 23, 43, 63, 83]
    images = BetonImages.of(tmp_path / "snow-3.beton")
    assert [images[index][1] for index in range(5)] == [0, 1, 0, 1, 0] and images[0][0].shape == (40, 30, 3)
    assert verify(tmp_path / "fog-1.beton", level=2).classes == ["a", "b"]
    assert infos[0].sidecar["source"]["of"] == verify(clean).digest
    before = (tmp_path / "fog-1.beton").stat().st_mtime_ns
    write(clean, tmp_path)  # continues where it stopped
    assert (tmp_path / "fog-1.beton").stat().st_mtime_ns == before
    (some,) = write(clean, tmp_path / "some", corruptions=["fog"], severities=[3], subset=2)
    assert pixels(some.path) == [
        pixels(tmp_path / "fog-3.beton")[i] for i in (0, 2)
    ]  # the same image is corrupted in the same way
    with pytest.raises(DataError, match=r"fog-1\.beton: already exists and was made with other settings"):
        write(clean, tmp_path, seed=1)


def test_random_numbers_depend_on_seed_severity_and_sample_only(clean: Path, tmp_path: Path) -> None:
    first = [
        image.tobytes()
        for image in (CorruptedImages(BetonImages.of(clean), "fog", 1, 0, None, 32, add_severity)[i][0] for i in (3, 0))
    ]
    again = [
        image.tobytes()
        for image in (CorruptedImages(BetonImages.of(clean), "fog", 1, 0, None, 32, add_severity)[i][0] for i in (0, 3))
    ]
    assert first == again[::-1]
    seeds = [
        CorruptedImages(BetonImages.of(clean), "fog", 1, seed, None, 32, add_severity)[0][0][0, 0, 0]
        for seed in range(20)
    ]
    assert len(set(seeds)) > 3


def test_small_images_are_enlarged_and_shrunk_again(clean: Path) -> None:
    seen = []

    def look(image: np.ndarray, *_: object) -> np.ndarray:
        seen.append(image.shape)
        return image

    image, _ = CorruptedImages(BetonImages.of(clean), "fog", 1, 0, None, 60, look)[2]
    assert seen == [(80, 60, 3)] and image.shape == (40, 30, 3) and (image == 40).all()
    image, _ = CorruptedImages(BetonImages.of(clean), "fog", 1, 0, 28, 32, look)[2]
    assert seen[1] == (32, 32, 3) and image.shape == (28, 28, 3)
    assert centre_square(np.zeros((400, 300, 3), np.uint8), 224).shape == (224, 224, 3)


def test_images_stored_as_jpeg_are_decoded(tmp_path: Path) -> None:
    write_beton(
        tmp_path / "a.beton",
        Squares(),
        classes=["a", "b"],
        options=ImageOptions(write_mode="jpg"),
        source={},
        num_workers=1,
    )
    assert pixels(tmp_path / "a.beton") == pytest.approx([0, 20, 40, 60, 80], abs=2)


def test_cifar_c_as_published(
    clean: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("data_prep.corrupt.CIFAR_C_IMAGES", 3)
    (tmp_path / "CIFAR-C").mkdir()
    images = np.arange(6, dtype=np.uint8)[:, None, None, None] * np.ones((1, 32, 32, 3), np.uint8)
    np.save(tmp_path / "CIFAR-C" / "fog.npy", images)
    np.save(tmp_path / "CIFAR-C" / "labels.npy", np.array([0, 1, 1] * 2))
    arguments = ["cifar-c", "--source", f"{tmp_path}/CIFAR-C", "--like", str(clean), "--output", f"{tmp_path}/out"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert pixels(tmp_path / "out" / "fog-1.beton") == [0, 1, 2] and pixels(tmp_path / "out" / "fog-2.beton") == [
        3,
        4,
        5,
    ]
    assert [BetonImages.of(tmp_path / "out" / "fog-2.beton")[index][1] for index in range(3)] == [0, 1, 1]
    np.save(tmp_path / "CIFAR-C" / "snow.npy", images.astype(np.float32))
    assert main(arguments) == 65
    np.save(tmp_path / "CIFAR-C" / "labels.npy", np.array([object()] * 6), allow_pickle=True)
    assert main(arguments) == 65
    assert "labels.npy: cannot be read" in capsys.readouterr().err


def test_imagenet_c_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for severity in (1, 2):
        for label, name in enumerate(("n01", "n02")):
            folder = tmp_path / "C" / "fog" / str(severity) / name
            folder.mkdir(parents=True)
            Image.fromarray(np.full((24, 24, 3), 50 * severity + 100 * label, np.uint8)).save(
                folder / "a.JPEG", quality=95
            )
    arguments = ["imagenet-c", "--source", f"{tmp_path}/C", "--output", f"{tmp_path}/out"]
    assert main(arguments) == 0, capsys.readouterr().err
    assert pixels(tmp_path / "out" / "fog-2.beton") == pytest.approx([100, 200], abs=2)
    assert verify(tmp_path / "out" / "fog-1.beton").classes == ["n01", "n02"]
    before = (tmp_path / "out" / "fog-1.beton").stat().st_mtime_ns
    damaged = bytearray((tmp_path / "out" / "fog-2.beton").read_bytes())
    damaged[0] ^= 1
    (tmp_path / "out" / "fog-2.beton").write_bytes(damaged)
    assert main(arguments) == 0, capsys.readouterr().err  # continues where it stopped, and repairs
    assert (tmp_path / "out" / "fog-1.beton").stat().st_mtime_ns == before
    assert pixels(tmp_path / "out" / "fog-2.beton") == pytest.approx([100, 200], abs=2)
    (tmp_path / "C" / "fog" / "2" / "n02").rename(tmp_path / "C" / "fog" / "2" / "n03")
    assert main(["imagenet-c", "--source", f"{tmp_path}/C", "--output", f"{tmp_path}/other"]) == 65
    assert "its classes differ from those of" in capsys.readouterr().err


def test_without_the_package_one_line_says_what_to_install(
    clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("imagecorruptions"):
        pytest.skip("it is installed")
    assert main(["corrupt", "--source", str(clean), "--output", str(tmp_path)]) == 69
    assert "pip install -e '.[corruptions]'" in capsys.readouterr().err


def test_a_folder_holds_sets_of_one_origin(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(clean, tmp_path / "out", corruptions=["snow"], severities=[1])
    (tmp_path / "C" / "fog" / "1" / "n01").mkdir(parents=True)
    Image.new("RGB", (24, 24)).save(tmp_path / "C" / "fog" / "1" / "n01" / "a.JPEG")
    assert main(["imagenet-c", "--source", f"{tmp_path}/C", "--output", f"{tmp_path}/out"]) == 65
    assert "snow-1.beton: expected kind 'imagenet-c', got 'corrupted'" in capsys.readouterr().err
    assert not (tmp_path / "out" / "fog-1.beton").exists()
    assert main(["imagenet-c", "--source", f"{tmp_path}/C", "--output", f"{tmp_path}/published"]) == 0
    with pytest.raises(DataError, match="expected kind 'corrupted', got 'imagenet-c'"):
        write(clean, tmp_path / "published", corruptions=["snow"])


def test_an_unknown_corruption_is_refused(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["corrupt", "--source", str(clean), "--output", str(tmp_path), "--corruptions", "rain"]) == 64
    assert "'rain' is not one of gaussian_noise" in capsys.readouterr().err


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_the_package_is_seeded(corruption: str) -> None:
    pytest.importorskip("imagecorruptions")
    texture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8).repeat(6, axis=0).repeat(5, axis=1)
    images = CorruptedImages([(texture, 0)] * 4, corruption, 3, 0, None, 48, package_corrupt())  # type: ignore[arg-type]
    image = images[3][0]
    images[2]  # another image in between
    assert np.array_equal(image, images[3][0]) and image.shape == texture.shape and not np.array_equal(image, texture)
