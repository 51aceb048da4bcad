"""Scan all pages of a .beton file once: hash each page, hash the images, and decode every JPEG strictly."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.datasets.beton_format import JPEG, Tables, damaged
from pipeline.limits import usable_cpus

OnProgress = Callable[[int, int], None]  # pages done, total number of pages


def scan(tables: Tables, *, expected_pages: list[str] | None, on_progress: OnProgress | None) -> tuple[list[str], str]:
    """Return the sha256 of each page, and the sha256 of all images and labels in sample order.

    Raises:
        DataError: a page or an image is damaged.
    """
    order = np.argsort(tables.pointer, kind="stable")
    page_of = (tables.pointer[order] - tables.pages_start) // tables.page_size
    bounds = np.searchsorted(page_of, np.arange(tables.num_pages + 1))
    image_sha256 = np.zeros((len(order), 32), dtype=np.uint8)

    def scan_page(page: int) -> str:
        start = tables.pages_start + page * tables.page_size
        content = memoryview(os.pread(file.fileno(), tables.page_size, start))
        digest = hashlib.sha256(content).hexdigest()
        samples = order[bounds[page] : bounds[page + 1]]
        if expected_pages is not None and digest != expected_pages[page]:
            raise damaged(
                tables.path,
                f"page {page} ({_range(samples)}) is damaged: its sha256 differs from the one in the sidecar",
            )
        for sample in samples:
            begin = int(tables.pointer[sample]) - start
            image = content[begin : begin + int(tables.size[sample])]
            image_sha256[sample] = np.frombuffer(hashlib.sha256(image).digest(), dtype=np.uint8)
            if tables.samples["image"]["mode"][sample] == JPEG:
                _decode(tables, int(sample), image)
        return digest

    pages = []
    num_threads = min(usable_cpus(), 32)
    # threads, because hashing and decoding release the interpreter lock
    with tables.path.open("rb") as file, ThreadPoolExecutor(num_threads) as pool:
        try:
            for page in pool.map(scan_page, range(tables.num_pages)):
                pages.append(page)
                if on_progress is not None:
                    on_progress(len(pages), tables.num_pages)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    image = tables.samples["image"]
    columns = (image["mode"], image["width"], image["height"], tables.samples["label"], image_sha256)
    return pages, hashlib.sha256(b"".join(column.tobytes() for column in columns)).hexdigest()


def _range(samples: np.ndarray) -> str:
    if len(samples) == 0:
        return "without samples"
    first, last = samples.min(), samples.max()
    count = "" if len(samples) == last - first + 1 else f"{len(samples)} of the "
    return f"{count}samples {first} to {last}"


def _decode(tables: Tables, sample: int, content: memoryview) -> None:
    """Decode one JPEG strictly with Pillow, and compare it with its row in the sample table."""
    from PIL import Image

    from pipeline.datasets.image_file import split_metadata

    row = tables.samples["image"][sample]
    size = (int(row["width"]), int(row["height"]))
    try:
        with Image.open(io.BytesIO(split_metadata(bytes(content))[0]), formats=["JPEG"]) as image:
            if image.size != size or image.mode != "RGB":  # compared before decoding: a header may claim any size
                raise damaged(
                    tables.path,
                    f"sample {sample} is a JPEG of {image.size} {image.mode}, but the sample table says {size} RGB",
                )
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise damaged(tables.path, f"sample {sample} cannot be decoded: {error}") from error
