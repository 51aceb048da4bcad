"""Makes JPEGs like ImageNet's: crops of scikit-learn's and scikit-image's photographs, with grain."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

VERSION = 1  # of the code below; part of the folder's name
SHAPES = (
    (375, 500),
    (500, 375),
    (333, 500),
    (500, 333),
    (500, 500),
    (400, 300),
    (500, 400),
    (427, 500),
    (500, 500),
    (281, 500),
)
GRAIN = 9.0  # standard deviation: gives 86 KB per image, like ImageNet's of this size
QUALITY = 90


def photographs(num_images: int) -> Path:
    """Make ``num_images`` files ``<source>/<number>.jpg`` in the temporary folder, unless they exist."""
    folder = Path(tempfile.gettempdir()) / f"ticketworks-photographs-{VERSION}-{num_images}"
    if folder.is_dir():
        return folder
    cv2.setNumThreads(1)  # before OpenCV starts threads, which a process forked later would not have and wait for
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    random = np.random.default_rng(0)
    images = _sources()
    names = sorted(images)
    for index in range(num_images):
        name = names[index % len(names)]
        (partial / name).mkdir(exist_ok=True)
        image = _crop(images[name], SHAPES[random.integers(len(SHAPES))], random)
        pixels = np.clip(image + random.normal(0.0, GRAIN, (*image.shape[:2], 1)), 0, 255).astype(np.uint8)
        cv2.imwrite(str(partial / name / f"{index:05}.jpg"), pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    try:
        partial.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(partial)
    return folder


def _sources() -> dict[str, NDArray[np.uint8]]:
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_images

    data: Any = skimage_data
    china, flower = load_sample_images().images
    taken: dict[str, Any] = {
        "astronaut": data.astronaut(),
        "chelsea": data.chelsea(),
        "coffee": data.coffee(),
        "rocket": data.rocket(),
    }
    taken |= {"hubble": data.hubble_deep_field(), "ihc": data.immunohistochemistry(), "retina": data.retina()}
    return taken | {"china": china, "flower": flower}


def _crop(image: NDArray[np.uint8], shape: tuple[int, int], random: np.random.Generator) -> NDArray[np.float64]:
    height, width = shape
    scale = min(image.shape[0] / height, image.shape[1] / width) * random.uniform(0.6, 1.0)
    crop_height, crop_width = int(height * scale), int(width * scale)
    top, left = random.integers(image.shape[0] - crop_height + 1), random.integers(image.shape[1] - crop_width + 1)
    crop = image[top : top + crop_height, left : left + crop_width]
    return np.asarray(
        cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA if scale > 1 else cv2.INTER_CUBIC), np.float64
    )
