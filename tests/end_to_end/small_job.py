"""A small version of the demo."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch

from data_prep import doctor
from pipeline.tickets.format import Ticket, decode
from pipeline.tickets.store import TicketStore
from tests.support.launch import ROOT, command, run

TRAIN = ROOT / "launchers" / "train.py"
NUM_TRAIN, NUM_VAL, NUM_HELD_OUT = 2000, 500, 100
SMALL = [
    "model.args={width: 8, stem_stride: 2}",
    "train.global_batch=64",
    "plan.reference_batch=64",
    "plan.exploration.length=2 epochs",
    "plan.exploration.update_interval=6 steps",
    "plan.num_refinements=2",
    "evaluation.recalibration_batches=4",
    "checkpoint.every=5 steps",
    "evaluation.every=never",
    "tracking.backend=jsonl",
    "tracking.log_every_steps=10",
]
STEPS = 4 * (NUM_TRAIN // 64)


def make_data(source: Path, output: Path) -> None:
    """Write the first images of Fashion-MNIST: to ``source`` as published, to ``output`` as .beton.

    ``output`` also has ``held_out.beton``.
    """
    for prefix, num in (("train", NUM_TRAIN + NUM_HELD_OUT), ("t10k", NUM_VAL)):
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
            content = gzip.decompress((doctor.FASHION_MNIST / f"{prefix}-{kind}-ubyte.gz").read_bytes())
            size = 784 if header == 16 else 1
            head = bytearray(content[:header])
            head[4:8] = num.to_bytes(4, "big")
            (source / f"{prefix}-{kind}-ubyte").write_bytes(bytes(head) + content[header : header + num * size])
    prepare = ["-m", "data_prep", "fashion-mnist", "--source", str(source), "--output", str(output)]
    prepare += ["--hold-out", str(NUM_HELD_OUT)]
    run([*command("python", prepare[0], prepare[1:])], log=output / "log")


def arguments(data: Path, output: Path, *more: str) -> list[str]:
    files = [f"data.train={data / 'train.beton'}", f"data.val={data / 'val.beton'}", f"output_dir={output}"]
    return ["--config", "fashion_mnist_s90", *SMALL, *files, *more]


def tickets_of(output: Path) -> list[Ticket]:
    store = TicketStore(output / "tickets")
    return [decode(ref.path) for ref in store.list()]


def assert_same(first: list[Ticket], second: list[Ticket], *, num: int = 3) -> None:
    """Assert equal masks and equal bits of every weight and statistic."""
    assert len(first) == len(second) == num
    for a, b in zip(first, second, strict=True):
        assert a.provenance.mask_digest == b.provenance.mask_digest
        assert a.provenance.r_s == b.provenance.r_s
        assert a.state.keys() == b.state.keys()
        assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)
