"""The entries of the zoo: which run each comes from, and how it is trained again. docs/study-plan.md has the cells."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.study_cells import CELLS
from pipeline.errors import ConfigError, RunError
from tools.zoo import add, write_page

ROOT = Path(__file__).resolve().parents[2]
DATA = {
    "fashion_mnist": "Fashion-MNIST, 60,000 training and 10,000 test images of clothes, 28×28, grey, 10 classes "
    "(MIT licence, arXiv 1708.07747)",
    "emoji": "emoji of five sets, 8,148 training and 3,214 test images in colour, 32×32, 28 classes "
    "(Apache-2.0, CC BY 4.0 and MIT licences, docs/data.md)",
}
# What a verification starts from and compares; neither changes a bit of the training.
KEPT = ("checkpoint.every=234 steps", "checkpoint.keep_every=1", "tracking.log_every_steps=117")


@dataclass(frozen=True)
class Entry:
    """A run of the zoo: one of a cell of the study, or of a recipe on two ranks under DeepSpeed."""

    source: str  # name of a cell, or of a file in configs/
    ticket: str  # the network that the entry's name loads
    num_checkpoints: int  # that are published
    seed: int = 0


ENTRIES = {
    "fashion_mnist_s90": Entry("fashion_mnist_s90", "superposition-mean", 7),
    "fashion_mnist_rigl_itop": Entry("fashion_mnist/0.1/rigl_itop", "ticket-000", 4),
    "fashion_mnist_edst": Entry("fashion_mnist/0.1/edst", "ticket-003", 4),
    "fashion_mnist_sup": Entry("fashion_mnist/0.1/sup_rigl", "superposition-mean", 4),
}


def remake(
    names: list[str], data: Path, runs: Path, *, train: Callable[..., int], extra: tuple[str, ...] = (), folder: Path
) -> None:
    """Train the runs of entries of the zoo, as far as they are not done, and put them in the place of what is there.

    Args:
        names: of ``ENTRIES``; none: all.
        data: folder of the data sets, by name; it stands in the card, so that it should be relative.
        runs: folder of the runs.
        train: trains a cell, ``benchmarks.study.train``.
        extra: further settings, for short trials.
        folder: the zoo.

    Raises:
        ConfigError: there is no entry of this name.
        RunError: a run failed.
    """
    if unknown := [name for name in names if name not in ENTRIES]:
        raise ConfigError(f"{unknown[0]}: is not an entry of the zoo", do=f"choose from {', '.join(ENTRIES)}")
    for name in names or ENTRIES:
        entry = ENTRIES[name]
        cell = CELLS.get(entry.source)
        of = (cell.config if cell is not None else entry.source).removeprefix("study_").removesuffix("_s90")
        if cell is not None:
            place = runs / "zoo" / cell.name / f"seed={entry.seed}"
            code = train(
                dataclasses.replace(cell, seeds=(entry.seed,)), data, runs / "zoo", jobs=1, extra=(*KEPT, *extra)
            )
        else:
            place = runs / "zoo" / name
            code = subprocess.call(
                [
                    *(str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"),
                    *(str(ROOT / "launchers" / "train.py"), "--config", entry.source, "--resume", "auto"),
                    *(f"seed={entry.seed}", f"output_dir={place}", "checkpoint.keep_every=1"),
                    *(f"data.{split}={data / of / split}.beton" for split in ("train", "val")),
                    *extra,
                ]
            )
        if code:
            raise RunError(f"{name}: its run ended with exit code {code}", do="read the lines above")
        add(
            place,
            name,
            ticket=entry.ticket,
            data=DATA[of],
            num_checkpoints=entry.num_checkpoints,
            folder=folder,
            replace=True,
        )
        write_page(folder)
        print(f"{folder / name}: made from {place}", flush=True)
