"""Parts of JPEGs have the pixels of a whole decode; other JPEGs are decoded whole."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from data_prep.jpeg_field import encode_jpeg
from pipeline.data.jpeg_region import cut

SAMPLINGS = {
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
}


def picture(height: int, width: int) -> np.ndarray:
    small = np.random.default_rng(height).integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def jpeg_of(image: np.ndarray, *, interval: int = 1, sampling: str = "4:2:0") -> np.ndarray:
    parameters = [cv2.IMWRITE_JPEG_RST_INTERVAL, interval, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]]
    return cv2.imencode(".jpg", image, parameters)[1].reshape(-1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_part_has_the_pixels_of_the_whole(sampling: str) -> None:
    random = np.random.default_rng(0)
    num_parts = 0
    for height, width in ((160, 192), (157, 75), (33, 201)):  # whole MCUs, and not
        jpeg = jpeg_of(picture(height, width), sampling=sampling)
        whole = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        for _ in range(150):
            box_height, box_width = (int(random.integers(1, size + 1)) for size in (height, width))
            top, left = int(random.integers(height - box_height + 1)), int(random.integers(width - box_width + 1))
            part, part_top, part_left, part_height, part_width = cut(
                jpeg, height, width, (top, left, box_height, box_width)
            )
            pixels = cv2.imdecode(part, cv2.IMREAD_COLOR)
            assert pixels.shape == (part_height, part_width, 3)
            y, x = top - part_top, left - part_left
            assert np.array_equal(
                pixels[y : y + box_height, x : x + box_width], whole[top : top + box_height, left : left + box_width]
            )
            num_parts += len(part) < len(jpeg)
    assert num_parts > 300


def test_a_part_is_no_larger_than_it_must_be() -> None:
    jpeg = encode_jpeg(picture(160, 160), 90)
    # the box touches MCUs 2 to 4 down and 3 to 5 across, its own and none of their neighbours: it
    # ends a pixel before them
    assert cut(jpeg, 160, 160, (33, 49, 46, 46))[1:] == (32, 48, 48, 48)
    assert cut(jpeg, 160, 160, (32, 48, 48, 48))[1:] == (
        16,
        32,
        80,
        80,
    )  # at their edge: colour is interpolated over it
    assert len(cut(jpeg, 160, 160, (33, 49, 46, 46))[0]) < len(jpeg) / 4


def test_restart_markers_change_no_pixel_and_cost_few_bytes() -> None:
    image = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    with_markers = encode_jpeg(image, 90)
    plain = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1].reshape(-1)
    assert np.array_equal(cv2.imdecode(with_markers, 1), cv2.imdecode(plain, 1))
    assert len(plain) < len(with_markers) < 1.05 * len(plain)


def test_whatever_else_there_is_stays_whole() -> None:
    image = picture(64, 64)
    good = jpeg_of(image)
    progressive = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1, cv2.IMWRITE_JPEG_RST_INTERVAL, 1])[
        1
    ].reshape(-1)
    markers = [i for i in range(len(good) - 1) if good[i] == 0xFF and 0xD0 <= good[i + 1] <= 0xD7]
    missing, doubled = np.delete(good, [markers[3], markers[3] + 1]), good.copy()
    doubled[markers[3] + 1] = good[markers[2] + 1]
    for jpeg in (
        jpeg_of(image, interval=0),
        jpeg_of(image, interval=4),
        progressive,
        missing,
        doubled,
        good[:-2],
        good[:300],
        good[:1],
    ):
        assert cut(jpeg, 64, 64, (0, 0, 10, 10))[1:] == (0, 0, 64, 64)
    assert cut(good, 64, 80, (0, 0, 10, 10))[1:] == (0, 0, 64, 80)  # not the size that the file's table says


def test_damage_never_reads_beyond_the_jpeg() -> None:
    random = np.random.default_rng(1)
    good = jpeg_of(picture(48, 48))
    for _ in range(2000):
        jpeg = good[: random.integers(1, len(good) + 1)].copy()
        for _ in range(random.integers(0, 4)):
            jpeg[random.integers(len(jpeg))] = random.integers(256)
        part, top, left, height, width = cut(jpeg, 48, 48, (20, 20, 9, 9))
        assert len(part) <= len(jpeg)
        assert 0 <= top <= 20 <= 29 <= top + height <= 48
        assert 0 <= left <= 20 <= 29 <= left + width <= 48
