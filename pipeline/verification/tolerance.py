"""Compare a segment that was run again where its bits cannot be the same: on another processor or other libraries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.chain import REPORT, Record
from pipeline.config.schema import Config
from pipeline.verification.claims import BEST, Claims
from pipeline.verification.segments import Rerun

LOSS_RELATIVE, LOSS_ABSOLUTE = 0.1, 0.05
ACCURACY, STANDARD_ERRORS = 0.01, 3.0


def loss_bound(claimed: float) -> float:
    """Return by how much the mean loss of a report may differ."""
    return LOSS_RELATIVE * claimed + LOSS_ABSOLUTE


def accuracy_bound(claimed: float, num_images: int) -> float:
    """Return by how much the top-1 of a ticket may differ: a point, and 3 standard errors of a difference."""
    share = min(max(claimed, 1 / num_images), 1 - 1 / num_images)
    return ACCURACY + STANDARD_ERRORS * math.sqrt(2 * share * (1 - share) / num_images)


def outside(claims: Claims, found: Rerun, config: Config) -> tuple[str, str]:
    """Compare losses and the accuracy of tickets.

    Args:
        claims: the run.
        found: the segment that was run again.
        config: the configuration, with the paths of the data sets here.

    Returns:
        What is out of bounds, or empty; and what was compared, in words.
    """
    losses = [_losses(records) for records in (found.segment.records, found.records)]
    widest = 0.0
    for step, claimed in losses[0].items():
        here = losses[1].get(step)
        bound = loss_bound(claimed)
        if here is None or not abs(here - claimed) <= bound:
            return f"loss at step {step + 1}: claimed {claimed:.4f}, here {here}, expected within {bound:.4f}", ""
        widest = max(widest, abs(here - claimed))
    words = [f"{len(losses[0])} losses within {widest:.4f}"] if losses[0] else []
    pairs = _tickets(claims, found)
    if pairs:
        *accuracies, num_images = top1_of([path for pair in pairs for path in pair], config)
        for (path, _), claimed, here in zip(pairs, accuracies[::2], accuracies[1::2], strict=True):
            bound = accuracy_bound(claimed, int(num_images))
            if abs(here - claimed) > bound:
                what = f"top-1 of {path.name}: claimed {100 * claimed:.2f}%, here {100 * here:.2f}%"
                return f"{what}, expected within {100 * bound:.2f} points", ""
            words.append(f"{path.stem} {100 * claimed:.2f}% against {100 * here:.2f}%")
    return "", ", ".join(words) or "nothing to compare in it"


def _losses(records: Sequence[Record]) -> dict[int, float]:
    """Return the mean training loss of each report: run step -> loss."""
    metrics = [record["metrics"] for record in records if record["kind"] == REPORT]
    return {
        int(step): float(values["train/loss"])
        for of in metrics
        for step, values in of.items()
        if "train/loss" in values
    }


def _tickets(claims: Claims, found: Rerun) -> list[tuple[Path, Path]]:
    """Return the claimed tickets of the segment that are there, each with the one that was made again."""
    pairs = []
    for path, _, record in claims.ticket_files():
        folder = found.folder / "tickets" / (BEST if path.parent.name == BEST else "")
        if found.segment.start < record["step"] <= found.segment.stop and path.exists():
            pairs.append((path, folder / path.name))
    return pairs


def top1_of(paths: Sequence[Path], config: Config) -> list[float]:
    """Return the top-1 accuracy of each ticket on ``data.val``, in [0, 1], and the number of images."""
    from pipeline.data.loaders import open_eval_loader
    from pipeline.datasets.sets import inspect
    from pipeline.distributed import session
    from pipeline.engine.torch_engine import autocast_dtype
    from pipeline.evaluation.members import network_of
    from pipeline.evaluation.networks import evaluation_setup
    from pipeline.evaluation.predict import Networks
    from pipeline.evaluation.score import score
    from pipeline.tickets.format import decode

    setup = evaluation_setup(config, train_loader=None)
    networks = Networks(
        [network_of(decode(path), setup) for path in paths], autocast_dtype=autocast_dtype(config.train)
    )
    loader = open_eval_loader(
        inspect(config.data.val).path,
        config.data,
        batch=config.evaluation.batch,
        device=session.device(),
        channels_last=config.train.channels_last,
    )
    scores = score(networks, loader, num_classes=config.model.num_classes)
    return [*(found.top1 for found in scores), float(loader.num_samples)]
