"""ImageNet from archives and from unpacked folders: the labels are always torchvision's."""

from __future__ import annotations

import logging
import os
import tarfile
from pathlib import Path

import pytest

from data_prep.archives import list_nested
from data_prep.image_files import WriteOptions
from data_prep.image_folder import write_image_folders
from data_prep.imagenet import DEVKIT, TRAIN, VAL, list_archives, list_unpacked, read_ground_truth, write_imagenet
from data_prep.images import ImageOptions
from pipeline.datasets.image_file import load_rgb
from pipeline.datasets.sidecar import verify
from pipeline.errors import DataError
from tests.support.imagenet_shaped import class_name, make_archives, make_image_folder

NUM_CLASSES = 6
OPTIONS = WriteOptions(ImageOptions("proportion", max_resolution=64), num_workers=2, chunk_size=4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("folders")
    return make_image_folder(root, num_classes=NUM_CLASSES, train_per_class=3, val_per_class=2, sides=(40, 60))


@pytest.fixture
def archives(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    return make_archives(tmp_path / "archives", *folders)


def unpack_val(archives: Path, folder: Path) -> Path:
    with tarfile.open(archives / VAL) as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_archives_and_unpacked_folders_become_the_same_images_and_labels(
    archives: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    train, val = write_imagenet(tmp_path / "a", source=archives, ground_truth=None, options=OPTIONS)
    assert (train.num_samples, val.num_samples, train.classes) == (
        18,
        12,
        [class_name(label) for label in range(NUM_CLASSES)],
    )
    folder_train, folder_val = write_image_folders(tmp_path / "b", train=folders[0], val=folders[1], options=OPTIONS)
    assert train.digest == folder_train.digest
    assert train.sidecar["source"]["manifest_sha256"] == folder_train.sidecar["source"]["manifest_sha256"]
    assert (
        val.sidecar["images"] != {} and val.digest != folder_val.digest
    )  # the files in val.tar are named by number: in another order

    source = tmp_path / "c"
    source.mkdir()
    (source / "train").symlink_to(folders[0])
    unpack_val(archives, source / "val")
    with pytest.raises(DataError, match=rf"has no {DEVKIT}.tar.gz, which holds the labels of the validation images"):
        write_imagenet(tmp_path / "d", source=source, ground_truth=None, options=OPTIONS)
    flat = write_imagenet(tmp_path / "d", source=source, ground_truth=archives / f"{DEVKIT}.tar.gz", options=OPTIONS)
    assert [info.digest for info in flat] == [train.digest, val.digest]
    verify(flat[0].path, level=2)


def test_validation_labels_follow_the_ground_truth(archives: Path, folders: tuple[Path, Path]) -> None:
    """Every validation image has its pixels in the class folder that its label names."""
    listed, classes = list_archives(archives, ground_truth=None)
    contents = {path.read_bytes(): path.parent.name for path in folders[1].glob("*/*")}
    num_seen = 0
    for label, samples in enumerate(listed["val"]):
        for sample in samples:
            source = sample.source
            content = source.path.read_bytes()[source.start :][: source.num_bytes]
            assert contents[content] == classes[label] == sample.name.split("/")[0]
            assert load_rgb(source)[0].shape[2] == 3
            num_seen += 1
    assert num_seen == 12


def test_ground_truth_as_folder_and_as_kaggles_table(
    archives: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    packed = read_ground_truth(archives / f"{DEVKIT}.tar.gz")
    with tarfile.open(archives / f"{DEVKIT}.tar.gz") as devkit:
        devkit.extractall(tmp_path, filter="data")
    assert read_ground_truth(tmp_path / DEVKIT) == packed
    assert packed.num_train == {
        class_name(label): 3 for label in range(NUM_CLASSES)
    }  # without the hierarchy's inner nodes

    rows = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 " for number, wnid in packed.wnids.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]))
    (tmp_path / "train").symlink_to(folders[0])
    unpack_val(archives, tmp_path / "val")
    (tmp_path / DEVKIT).rename(tmp_path / "aside")
    by_table, _ = list_unpacked(tmp_path, ground_truth=None)
    by_devkit, _ = list_unpacked(tmp_path, ground_truth=tmp_path / "aside")
    assert by_table == by_devkit
    (tmp_path / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nILSVRC2012_val_1,cat\n")
    with pytest.raises(DataError, match=r"is not a row of LOC_val_solution\.csv"):
        list_unpacked(tmp_path, ground_truth=None)


def test_kaggles_layout_is_found_from_any_of_its_folders(
    archives: Path, folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, classes = list_archives(archives, ground_truth=None)
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    root.mkdir(parents=True)
    (tmp_path / "ILSVRC" / "Annotations").mkdir()
    (root / "test").mkdir()
    (root / "train").symlink_to(folders[0])
    unpack_val(archives, root / "val")
    truth = read_ground_truth(archives / f"{DEVKIT}.tar.gz")
    rows = [f"ILSVRC2012_val_{number:08d},{wnid} 1 2 3 4 " for number, wnid in truth.wnids.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    for source in (tmp_path, tmp_path / "ILSVRC", root):
        listed, found = list_unpacked(source, ground_truth=None)
        assert found == classes
        for split in ("train", "val"):
            assert [[each.name for each in one] for one in listed[split]] == [
                [each.name for each in one] for one in expected[split]
            ]
    with pytest.raises(DataError, match=r"val: has no class folders; do: python -m data_prep imagenet --source FOLDER"):
        write_image_folders(
            tmp_path / "out", train=root / "train", val=root / "val", options=WriteOptions(ImageOptions())
        )
    with pytest.raises(DataError, match=r"nor ILSVRC/Data/CLS-LOC with them"):
        list_unpacked(tmp_path / "ILSVRC" / "Annotations", ground_truth=None)
    assert caplog.records == []
    with caplog.at_level(logging.WARNING):
        list_unpacked(folders[0].parent, ground_truth=None)
    assert "has 6 classes, ImageNet (ILSVRC 2012) has 1000" in caplog.text


def test_what_is_missing_or_cut_short_is_named(
    archives: Path, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def listing() -> None:
        list_archives(archives, ground_truth=None)

    train, val = archives / TRAIN, archives / VAL
    whole = train.read_bytes(), val.read_bytes()
    os.truncate(train, len(whole[0]) // 2)
    with pytest.raises(DataError, match=r"img_train.tar: (is truncated in|cannot be read as a tar archive)"):
        listing()
    (first, *_) = list_nested_of(whole[0], train)
    os.truncate(train, first)  # between two classes: the rest is a valid tar
    with pytest.raises(
        DataError, match=rf"classes of the ground truth are missing \({NUM_CLASSES - 1}\): {class_name(1)}"
    ):
        listing()
    train.write_bytes(whole[0])

    with tarfile.open(val) as archive:
        second = archive.getmembers()[1]
    os.truncate(val, second.offset)
    with pytest.raises(DataError, match=r"img_val.tar: 11 of 12 images are missing, the first is number 2"):
        listing()
    with tarfile.open(val, "w") as archive:
        archive.add(next(folders[1].glob("*/*")), "ILSVRC2012_val_00000013.JPEG")
    with pytest.raises(DataError, match=r"ILSVRC2012_val_00000013.JPEG is listed twice or is not one of the 12 images"):
        listing()
    with tarfile.open(val, "w") as archive:
        link = tarfile.TarInfo("ILSVRC2012_val_00000001.JPEG")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="is a link or a special file"):
        listing()
    val.unlink()
    with pytest.raises(DataError, match=f"has no {VAL}; do: download it from image-net.org"):
        listing()
    val.write_bytes(whole[1])

    (archives / f"{DEVKIT}.tar.gz").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"devkit_t12.tar.gz: cannot be read"):
        listing()
    with tarfile.open(archives / f"{DEVKIT}.tar.gz", "w:gz") as devkit:
        devkit.add(next(folders[1].glob("*/*")), f"{DEVKIT}/data/meta.mat")
        devkit.add(next(folders[1].glob("*/*")), f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt")
    with pytest.raises(DataError, match=r"data/meta.mat cannot be read"):
        listing()
    assert caplog.records == []


def list_nested_of(content: bytes, path: Path) -> list[int]:
    """Return the offsets in bytes of the headers of the second, third, … inner archive."""
    path.write_bytes(content)
    with tarfile.open(path) as archive:
        return [member.offset for member in archive.getmembers()][1:]


def test_a_class_with_fewer_images_than_the_devkit_says_is_reported(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    archives = make_archives(tmp_path / "archives", *folders)
    train = archives / TRAIN
    nested = list_nested(train)
    assert [len(images) for images in nested.values()] == [3] * NUM_CLASSES
    (tmp_path / "fewer").mkdir()
    for path in folders[0].iterdir():
        (tmp_path / "fewer" / path.name).mkdir()
        for image in sorted(path.iterdir())[: 2 if path.name == class_name(4) else 3]:
            (tmp_path / "fewer" / path.name / image.name).write_bytes(image.read_bytes())
    fewer = make_archives(tmp_path / "fewer archives", tmp_path / "fewer", folders[1])
    with caplog.at_level(logging.WARNING):
        list_archives(fewer, ground_truth=archives / f"{DEVKIT}.tar.gz")
    assert f"2 images of {class_name(4)}, but the devkit says 3" in caplog.text
