"""Makes the good inputs that the campaigns damage, as small as possible and without ffcv."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.checkpoint.verify import FORMAT, files_of
from pipeline.datasets.beton_format import (
    ALLOCATION,
    FIELD,
    FIELDS,
    HEADER,
    JPEG,
    METADATA_START,
    RAW,
    SAMPLE,
    VERSION,
    pages_start,
)
from pipeline.datasets.sidecar import build_sidecar, save_sidecar
from tests.support.launch import ROOT

CLASSES = ["ant", "bee", "cat"]
NUM_IMAGES, SIDE = 12, 8
PAGE = 1 << 21


def make_beton(path: Path, *, num_jpeg: int = 6) -> None:
    """Write a .beton file and its sidecar.

    Twelve images of 8×8 pixels in one page, the first ``num_jpeg`` as JPEG; label = index mod 3.
    """
    draw = np.random.default_rng(0)
    images = []
    for index in range(NUM_IMAGES):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        images.append(_jpeg(pixels) if index < num_jpeg else pixels.tobytes())
    start = pages_start(NUM_IMAGES, PAGE)
    header, fields = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
    header["version"], header["num_fields"], header["page_size"] = VERSION, len(FIELDS), PAGE
    header["num_samples"], header["allocation_table"] = NUM_IMAGES, start + PAGE
    for row, (name, kind) in zip(fields, FIELDS, strict=True):
        row["type_id"], row["name"][: len(name)] = kind, np.frombuffer(name.encode(), np.uint8)
    samples, allocations = np.zeros(NUM_IMAGES, SAMPLE), np.zeros(NUM_IMAGES, ALLOCATION)
    samples["label"] = np.arange(NUM_IMAGES) % len(CLASSES)
    samples["image"]["mode"] = [JPEG] * num_jpeg + [RAW] * (NUM_IMAGES - num_jpeg)
    samples["image"]["width"] = samples["image"]["height"] = SIDE
    sizes = np.array([len(image) for image in images])
    samples["image"]["pointer"] = allocations["pointer"] = start + np.cumsum(sizes) - sizes
    allocations["sample"], allocations["size"] = np.arange(NUM_IMAGES), sizes
    tables = header.tobytes() + fields.tobytes() + samples.tobytes()
    assert len(tables) == METADATA_START + NUM_IMAGES * SAMPLE.itemsize
    path.write_bytes(tables.ljust(start, b"\0") + b"".join(images).ljust(PAGE, b"\0") + allocations.tobytes())
    save_sidecar(path, build_sidecar(path, classes=CLASSES, writer={}, source={"kind": "noise"}))


def _jpeg(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def copy_beton(source: Path, target: Path) -> Path:
    """Copy the file and its sidecar to another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for ending in ("", ".json"):
        shutil.copy(f"{source}{ending}", f"{target}{ending}")
    return target


def make_config(path: Path, data: Path, output: Path) -> None:
    """Write the demo's configuration for the small files."""
    base = ROOT / "configs" / "fashion_mnist_s90.yaml"
    path.write_text(
        f"base: {base}\nname: small\noutput_dir: {output}\nmodel: {{num_classes: 3}}\ntrain: {{global_batch: 4}}\n"
        f"data: {{train: {data}/train.beton, val: {data}/val.beton}}\ntracking: {{backend: jsonl}}\n"
        "evaluation: {recalibration_batch: 4}\n"
    )


def make_ticket() -> bytes:
    """Return the bytes of a ticket: a layer of 40 weights (10 active), a bias and a buffer."""
    import torch

    from pipeline.tickets.format import Provenance, Ticket, encode
    from pipeline.tickets.network import Network

    mask = torch.zeros(10, 4, dtype=torch.bool)
    mask.view(-1)[::4] = True
    state = {
        "fc.weight": torch.linspace(0.5, 2.0, 40).view(10, 4) * mask,
        "fc.bias": torch.linspace(-1, 1, 10),
        "mean": torch.ones(3),
    }
    provenance = Provenance(
        index=0,
        model="cifar_resnet8",
        model_args={"width": 4},
        num_classes=3,
        method="rigl",
        phase="exploration",
        step=100,
        samples_seen=400,
        epochs=2.5,
        density=0.25,
        r_s=0.5,
        seed=3,
        parent_run="run",
        **dict.fromkeys(("config_digest", "data_digest", "mask_digest"), "00"),
        class_list_digest=hashlib.sha256(json.dumps(CLASSES, separators=(",", ":")).encode()).hexdigest(),
        preprocessing={
            "eval_resolution": SIDE,
            "eval_ratio": 1.0,
            "mean": [128.0] * 3,
            "std": [64.0] * 3,
            "train_resolution": SIDE,
        },
    )
    network = Network(tuple(CLASSES), parameters=50, density=20 / 50, dense={"fc.bias": "named in dense_layers"})
    return encode(Ticket(provenance, state, {"fc.weight": mask}, frozenset({"mean"}), network))


def make_checkpoint(folder: Path) -> None:
    """Write a checkpoint that is valid by its manifest; its tensors belong to no run."""
    folder.mkdir(parents=True)
    state = {
        "format": FORMAT,
        "step": 40,
        "samples_seen": 160,
        "world_size": 2,
        "environment": {"torch": "2.14"},
        "tracker_run": "pending-1",
        "config": {"name": "small", "seed": 0},
        "data_digest": "00",
        "sparsifier": {"update_index": 3, "mask_digest": "00"},
    }
    for name in files_of(2):
        (folder / name).write_bytes(
            json.dumps(state, indent=1).encode() if name == "state.json" else name.encode() * 100
        )
    write_manifest(folder)


def write_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest of the present files, with ``changes`` to its entries."""
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in sorted(files_of(2))
        if (folder / name).is_file()
    }
    (folder / "manifest.json").write_text(json.dumps({"files": files | changes}, indent=1))
