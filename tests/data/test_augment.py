"""Crop and flip, compared with plain Python code written from their definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pipeline.data.augment import centre_box, pad_crop, random_crop_box, resize, sample_stream, uniform

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def stream(key: int, sample: int) -> np.uint64:
    return np.uint64(sample_stream(np.uint64(key), sample))  # numba hands a plain int back


def mix(bits: int) -> int:
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & MASK
    return bits ^ (bits >> 31)


def plain_stream(key: int, sample: int) -> int:
    return mix(key ^ mix((sample + GOLDEN) & MASK))


def plain_uniform(stream: int, draw: int) -> float:
    return (mix((stream + (draw + 1) * GOLDEN) & MASK) >> 11) / 2**53


def plain_box(height: int, width: int, min_scale: float, stream: int) -> tuple[int, int, int, int]:
    low, high = math.log(3 / 4), math.log(4 / 3)
    for attempt in range(10):
        area = height * width * (min_scale + (1 - min_scale) * plain_uniform(stream, 1 + 2 * attempt))
        ratio = math.exp(low + (high - low) * plain_uniform(stream, 2 + 2 * attempt))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (
                int(plain_uniform(stream, 21) * (height - h + 1)),
                int(plain_uniform(stream, 22) * (width - w + 1)),
                h,
                w,
            )
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def test_uniform_numbers_are_splitmix64() -> None:
    # the first outputs of the published generator for seed 1234567
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [uniform(np.uint64(1234567), draw) for draw in range(3)] == [(bits >> 11) / 2**53 for bits in published]
    assert all(uniform(stream(MASK, s), 5) == plain_uniform(plain_stream(MASK, s), 5) for s in range(100))


def test_flips_are_fair() -> None:
    flips = sum(uniform(stream(9, sample), 0) < 0.5 for sample in range(10_000))
    assert abs(flips - 5000) < 200  # four standard deviations


@pytest.mark.parametrize(
    ("height", "width", "min_scale"), [(375, 500, 0.08), (500, 333, 0.25), (28, 28, 0.08), (40, 400, 0.5)]
)
def test_boxes_equal_the_plain_reading(height: int, width: int, min_scale: float) -> None:
    box = random_crop_box(min_scale)
    for sample in range(500):
        assert box(height, width, stream(3, sample)) == plain_box(height, width, min_scale, plain_stream(3, sample))


def test_a_box_that_never_fits_becomes_the_largest_centred_one() -> None:
    # the whole area of 100 x 10, at a ratio of at least 3/4, is sqrt(750) = 27 wide or more: never inside.
    # The fallback is 10 wide and 10 * 4/3 = 13 high, from (100 - 13) // 2
    assert random_crop_box(1.0)(100, 10, np.uint64(0)) == (43, 0, 13, 10)
    assert random_crop_box(1.0)(10, 100, np.uint64(0)) == (0, 43, 10, 13)


def test_boxes_have_torchvisions_distribution() -> None:
    from torchvision.transforms import RandomResizedCrop

    box, image = random_crop_box(0.08), torch.empty(3, 300, 400)
    ours = np.array([box(300, 400, stream(0, sample)) for sample in range(4000)], dtype=float)
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)], dtype=float
    )
    for measure in (
        lambda b: b[:, 2] * b[:, 3] / 120_000,
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        a, b = measure(ours), measure(theirs)  # type: ignore[no-untyped-call]
        spread = np.sqrt(a.var() / 4000 + b.var() / 4000)
        assert abs(a.mean() - b.mean()) < 4 * spread
        assert a.std() == pytest.approx(b.std(), rel=0.08)


def test_pad_crop_is_a_window_of_the_padded_image() -> None:
    image = np.random.default_rng(0).integers(1, 256, (6, 6, 3)).astype(np.uint8)
    fill = [10.4, 20.6, 30.0]
    padded = np.empty((14, 14, 3), np.uint8)
    padded[:] = [10, 21, 30]
    padded[4:10, 4:10] = image
    place, seen = pad_crop(fill), set()
    for sample in range(1000):
        out, bits = np.zeros_like(image), plain_stream(1, sample)
        place(image, np.uint64(bits), sample % 2 == 1, out)
        top, left = int(plain_uniform(bits, 1) * 9), int(plain_uniform(bits, 2) * 9)
        window = padded[top : top + 6, left : left + 6]
        assert np.array_equal(out, window[:, ::-1] if sample % 2 else window)
        seen.add((top, left))
    assert len(seen) == 81  # every offset from -4 to 4, both ways


def resized(
    image: np.ndarray, box: tuple[int, int, int, int], shape: tuple[int, int], *, is_flipped: bool = False
) -> np.ndarray:
    out = np.zeros((*shape, 3), np.uint8)
    resize(image, box, is_flipped, out)
    return out


def test_a_resized_pixel_is_the_mean_of_the_area_it_covers() -> None:
    row = np.repeat(np.array([[[0], [30], [90]]], np.uint8), 3, axis=2)
    # 3 columns to 2: each covers one and a half: (0 + 30 / 2) / 1.5 and (30 / 2 + 90) / 1.5
    assert resized(row, (0, 0, 1, 3), (1, 2))[0, :, 0].tolist() == [10, 70]
    assert resized(row, (0, 0, 1, 3), (1, 2), is_flipped=True)[0, :, 0].tolist() == [70, 10]
    # the last two columns to 3: the middle one covers half a column of each
    assert resized(row, (0, 1, 1, 2), (1, 3))[0, :, 0].tolist() == [30, 60, 90]
    assert resized(row.transpose(1, 0, 2).copy(), (0, 0, 3, 1), (2, 4))[:, :, 1].tolist() == [[10] * 4, [70] * 4]


@pytest.mark.parametrize("side", [37, 100, 231, 450])
def test_resizing_equals_exact_arithmetic(side: int) -> None:
    image, box = np.random.default_rng(side).integers(0, 256, (460, 470, 3), dtype=np.uint8), (3, 7, side, side + 5)

    def shares(size: int) -> np.ndarray:
        edges = np.arange(65)[:, None] * size / 64
        cells = np.arange(size)
        return np.clip(np.minimum(cells + 1, edges[1:]) - np.maximum(cells, edges[:-1]), 0, None) / (size / 64)

    part = image[3 : 3 + side, 7 : 12 + side].astype(float)
    exact = np.einsum("yh,hwc,xw->yxc", shares(side), part, shares(side + 5), optimize=True)
    ours = resized(image, box, (64, 64))
    assert np.abs(ours - exact).max() < 0.5 + 1e-4
    assert np.array_equal(resized(image, box, (64, 64), is_flipped=True), ours[:, ::-1])
    assert np.array_equal(resized(image, box, (side, side + 5)), part)  # its own size: unchanged


def test_shrinking_is_opencvs_area_interpolation() -> None:
    import cv2

    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    theirs = cv2.resize(image, (224, 224), interpolation=cv2.INTER_AREA)
    difference = np.abs(resized(image, (0, 0, 300, 400), (224, 224)).astype(int) - theirs)
    assert difference.max() <= 1  # where a mean is half-way between two numbers, but for rounding
    assert (difference > 0).mean() < 0.01


def test_the_centre_box_is_the_ratio_of_the_shorter_side() -> None:
    assert centre_box(0.875)(256, 300, np.uint64(0)) == (16, 38, 224, 224)
    assert centre_box(1.0)(28, 28, np.uint64(0)) == (0, 0, 28, 28)
