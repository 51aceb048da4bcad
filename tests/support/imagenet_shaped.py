"""Makes ImageNet-shaped data: many classes of crops of the two photographs of scikit-learn.

As class folders, or as archives with the structure in which ImageNet is published:

    python -m tests.support.imagenet_shaped FOLDER

writes 1,000 classes, each with 2 training images and 1 validation image of about 64 pixels.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_sample_images


def class_name(label: int) -> str:
    """Return ``n00000001`` for label 0; names sort like labels."""
    return f"n{label + 1:08d}"


def make_image_folder(
    root: Path,
    num_classes: int = 1000,
    train_per_class: int = 2,
    val_per_class: int = 1,
    seed: int = 0,
    sides: tuple[int, int] = (300, 500),
) -> tuple[Path, Path]:
    """Write ``root/train`` and ``root/val`` in torchvision's ImageFolder layout and return both paths.

    Every image is a different crop of a photograph, scaled to ``sides`` (shortest, longest) in pixels
    and possibly flipped; the same seed gives the same images.
    """
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    jobs = []
    for split, per_class in (("train", train_per_class), ("val", val_per_class)):
        for label in range(num_classes):
            folder = root / split / class_name(label)
            folder.mkdir(parents=True)
            jobs += [
                (folder / f"{class_name(label)}_{index}.JPEG", split == "val", label, index)
                for index in range(per_class)
            ]

    def write(job: tuple[Path, bool, int, int]) -> None:
        path, is_val, label, index = job
        random = np.random.default_rng((seed, is_val, label, index))
        _crop(photographs[random.integers(len(photographs))], random, sides).save(
            path, "JPEG", quality=int(random.integers(75, 96))
        )

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # Pillow releases the interpreter lock
        list(pool.map(write, jobs))
    return root / "train", root / "val"


def _crop(photograph: Image.Image, random: np.random.Generator, sides: tuple[int, int]) -> Image.Image:
    width, height = (int(side * random.uniform(0.4, 1.0)) for side in photograph.size)
    left, top = int(random.integers(photograph.width - width + 1)), int(random.integers(photograph.height - height + 1))
    size = (int(random.integers(sides[0], sides[1] + 1)), int(random.integers(sides[0], sides[1] + 1)))
    image = photograph.resize(size, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image


def make_archives(root: Path, train: Path, val: Path) -> Path:
    """Pack image folders into ``root`` in the way in which ImageNet is published.

    There is a tar with one tar per class, a tar of validation images, and the devkit. As in the
    original, the devkit numbers the classes in another order than that of their names, and also
    names inner nodes of the hierarchy.
    """
    wnids = sorted(path.name for path in train.iterdir())
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w", format=tarfile.USTAR_FORMAT) as outer:
        for wnid in wnids:
            content = io.BytesIO()
            with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as inner:
                for image in sorted((train / wnid).iterdir()):
                    inner.add(image, image.name)
            _add(outer, f"{wnid}.tar", content.getvalue())
    random = np.random.default_rng(0)
    number_of = dict(zip(wnids, (1 + random.permutation(len(wnids))).tolist(), strict=True))
    images = sorted(val.glob("*/*"))
    shown = [images[i] for i in random.permutation(len(images))]
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for index, image in enumerate(shown, 1):
            archive.add(image, f"ILSVRC2012_val_{index:08d}.JPEG")
    truth = "".join(f"{number_of[image.parent.name]}\n" for image in shown)
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz", compresslevel=1) as devkit:
        _add(devkit, "ILSVRC2012_devkit_t12/data/meta.mat", _meta({number_of[wnid]: wnid for wnid in wnids}, train))
        _add(devkit, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
    return root


def _meta(wnids: dict[int, str], train: Path) -> bytes:
    """Return the devkit's table of synsets: the classes by number, followed by two inner nodes."""
    columns = (
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    )
    rows = np.zeros((len(wnids) + 2, 1), dtype=[(name, object) for name in columns])
    for index, number in enumerate(sorted(wnids)):
        wnid = wnids[number]
        rows[index, 0] = (
            number,
            wnid,
            f"thing {number}",
            "a thing",
            0,
            np.zeros((1, 0)),
            0,
            len(list((train / wnid).iterdir())),
        )
    for index, wnid in enumerate(("n99999998", "n99999999")):
        rows[len(wnids) + index, 0] = (
            len(wnids) + 1 + index,
            wnid,
            "entity",
            "all things",
            2,
            np.array([[1, 2]]),
            1,
            0,
        )
    content = io.BytesIO()
    savemat(content, {"synsets": rows})
    return content.getvalue()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


if __name__ == "__main__":
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as temporary:
        make_archives(target, *make_image_folder(Path(temporary), sides=(48, 80)))
