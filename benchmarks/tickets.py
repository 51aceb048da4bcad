"""Measure what tickets cost: ``python -m benchmarks.tickets``.

ResNet-50, 90% ERK, one thread; files in one folder of a tmpfs, without fsync. Parts:

T1        size: ``torch.save`` of the dense state_dict / the ticket, which is exact (fp32)
T2        time to save: the ticket / ``torch.save`` of the dense state_dict; time to load: the ticket
          into an existing model, with its hash checked / ``torch.load``
E1        time: four evaluations of one ticket each / one pass with four tickets, on JPEGs that take
          longer to decode than to classify

Ends with an error only on a wrong result: a loaded ticket that differs in any bit, or predictions
that depend on how they were computed.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.support.bars import Bounds, Figure, Options, Results, bar, in_turn, options
from benchmarks.support.samples import sample_provenance
from pipeline import models
from pipeline.sparse.distribution import erk, exact_counts
from pipeline.sparse.layers import sparse_weights
from pipeline.sparse.update import magnitude_masks
from pipeline.tickets.format import Ticket, decode, encode, ticket_of

PARTS = ("T1", "T2", "E1")
MODEL, QUICK_MODEL = "resnet50", "cifar_resnet8"
DENSITY = 0.1
TMPFS = Path("/dev/shm")
BOUNDS = {
    "T2 save": Bounds("≤ 1.5", "1", "0.1"),
    "T2 load": Bounds("≤ 2.0", "1", "0.1"),
    "E1": Bounds("≥ 1.3"),
}
NUM_TICKETS, NUM_IMAGES = 4, 400


def main() -> None:
    given = options(__doc__, PARTS, models=(MODEL,), quick_model=QUICK_MODEL)
    results = Results()
    with tempfile.TemporaryDirectory(dir=TMPFS if TMPFS.is_dir() else None) as folder:
        for name in given.models:
            measure_files(name, Path(folder), given, results)
        if "E1" in given.only:
            measure_one_pass(Path(folder), given, results)
    results.write(given.json)


def measure_files(name: str, folder: Path, given: Options, results: Results) -> None:
    """Measure T1 and T2 on one network."""
    model = models.build(name)
    ticket = sparse_ticket(model)
    ours, theirs = folder / "ticket.safetensors", folder / "dense.pt"

    def save() -> None:
        ours.write_bytes(encode(ticket))

    def save_dense() -> None:
        torch.save(model.state_dict(), theirs)

    def load() -> None:
        model.load_state_dict(decode(ours).state)

    def load_dense() -> None:
        model.load_state_dict(torch.load(theirs, weights_only=True))

    save()
    save_dense()
    require_exact(ours, ticket)
    if "T1" in given.only:
        dense, packed = theirs.stat().st_size, ours.stat().st_size
        megabytes = f"{dense / 1e6:.2f} / {packed / 1e6:.2f} MB"
        text = f"{dense / packed:.2f} must be ≥ 7.3, aim 8.3, limit 8.6  ({megabytes}, {name})"
        results.add(Figure("T1", text, {"value": dense / packed, "dense_bytes": dense, "ticket_bytes": packed}))
    for part, numerator, denominator in (("T2 save", save, save_dense), ("T2 load", load, load_dense)):
        if "T2" in given.only:
            runs = [in_turn(numerator, denominator, rounds=given.rounds) for _ in range(given.runs)]
            results.add(bar(part, runs, BOUNDS[part]))


def sparse_ticket(model: nn.Module) -> Ticket:
    """Prune ``model`` by magnitude to 90% ERK; returns it as a ticket."""
    weights = dict(sparse_weights(model))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    masks = magnitude_masks(weights, exact_counts(shapes, erk(shapes, DENSITY), DENSITY))
    with torch.no_grad():
        for name, weight in weights.items():
            weight.mul_(masks[name])
    return ticket_of(model, masks, provenance=sample_provenance(num_classes=1000, density=DENSITY, r_s=DENSITY))


def require_exact(path: Path, ticket: Ticket) -> None:
    """Load the file and compare it with the ticket, bit for bit.

    Raises:
        AssertionError: if anything differs.
    """
    read = decode(path)
    for name, tensor in ticket.state.items():
        assert read.state[name].dtype == tensor.dtype and torch.equal(read.state[name], tensor), name
    assert all(torch.equal(read.masks[name], mask) for name, mask in ticket.masks.items())


def measure_one_pass(folder: Path, given: Options, results: Results) -> None:
    """Measure E1; both legs are timed on the same open loader."""
    from pipeline.config.schema import DataConfig
    from pipeline.data.loaders import open_eval_loader
    from pipeline.evaluation.predict import Networks, predict

    path = folder / "photographs.beton"
    num_images = 50 if given.is_quick else NUM_IMAGES
    write_photographs(path, num_images)
    data = DataConfig(eval_resolution=32, num_workers=1)
    loader = open_eval_loader(path, data, batch=100, device=torch.device(given.device), channels_last=True)
    torch.set_num_threads(given.threads)
    networks = [
        models.build(QUICK_MODEL, num_classes=10, args={"width": 8}, seed=seed).to(given.device).eval()
        for seed in range(NUM_TICKETS)
    ]

    def together() -> torch.Tensor:
        predicted = predict(Networks(networks), loader, num_classes=10)
        assert predicted is not None
        return predicted[0]

    def apart() -> torch.Tensor:
        predicted = [predict(Networks([network]), loader, num_classes=10) for network in networks]
        return torch.cat([each[0] for each in predicted if each is not None])

    torch.testing.assert_close(together(), apart(), rtol=0, atol=1e-6)
    runs = [in_turn(apart, together, rounds=given.rounds) for _ in range(given.runs)]
    results.add(bar("E1", runs, BOUNDS["E1"]))


def write_photographs(path: Path, num_images: int) -> None:
    """Write JPEGs of 400 to 500 pixels, cut out of the two photographs that come with scikit-learn."""
    from sklearn.datasets import load_sample_images

    from data_prep.images import ImageOptions
    from data_prep.writer import write_beton

    dataset = _Photographs([np.asarray(image) for image in load_sample_images().images], num_images)
    write_beton(
        path,
        dataset,
        classes=[str(label) for label in range(10)],
        options=ImageOptions("jpg"),
        source={},
        num_workers=1,
    )


class _Photographs:
    def __init__(self, photographs: list[np.ndarray], num_images: int) -> None:
        self.photographs, self.num_images = photographs, num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        photograph, draw = self.photographs[index % 2], np.random.default_rng(index)
        height, width = (int(draw.integers(380, 420)), int(draw.integers(400, 500)))
        top, left = (
            int(draw.integers(full - side + 1)) for full, side in zip(photograph.shape, (height, width), strict=False)
        )
        return np.ascontiguousarray(photograph[top : top + height, left : left + width]), index % 10


if __name__ == "__main__":
    main()
