"""One rank of a real process group, run by test_loaders.py.

It reads everything and saves it to ``<output>/rank<k>.npz``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.command_line import leave
from pipeline.config.schema import DataConfig
from pipeline.data.loaders import EvalLoader, TrainLoader, open_eval_loader, open_train_loader
from pipeline.distributed.group import join
from pipeline.distributed.session import rank

GLOBAL_BATCH = 4
NUM_STEPS = 7  # of 5 per epoch: into the second one
RECALIBRATION = {"batch": 3, "num_batches": 5, "seed": 2}


def data_config(path: Path, **changes: object) -> DataConfig:
    data = DataConfig(
        train=str(path), val=str(path), train_resolution=16, eval_resolution=16, num_workers=1, batch_timeout_seconds=60
    )
    for name, value in changes.items():
        assert hasattr(data, name)
        setattr(data, name, value)
    return data


def open_both(data: DataConfig) -> tuple[TrainLoader, EvalLoader]:
    cpu = torch.device("cpu")
    return (
        open_train_loader(Path(data.train), data, global_batch=GLOBAL_BATCH, seed=5, device=cpu, channels_last=True),
        open_eval_loader(Path(data.val), data, batch=4, device=cpu, channels_last=True),
    )


def read_all(train: TrainLoader, evaluation: EvalLoader) -> dict[str, np.ndarray]:
    """Read all batches; ``images``: [steps, batch, 3, 16, 16], in the order of the global batch.

    Labels are sample ids.
    """
    steps = [batch for _, batch in train.steps(0, NUM_STEPS)]
    ids, images, labels = zip(*evaluation.batches(), strict=True)
    return {
        "images": torch.stack([images for images, _ in steps]).numpy(),
        "labels": torch.stack([labels for _, labels in steps]).numpy(),
        "micro_batches": torch.stack(list(train.micro_batches(**RECALIBRATION))).numpy(),
        "eval_ids": torch.cat(ids).numpy(),
        "eval_images": torch.cat(images).numpy(),
        "eval_labels": torch.cat(labels).numpy(),
    }


if __name__ == "__main__":
    with join(timeout_seconds=60):
        arrays = read_all(*open_both(data_config(Path(sys.argv[1]))))
        np.savez(Path(sys.argv[2]) / f"rank{rank()}.npz", allow_pickle=False, **arrays)
    leave(0)
