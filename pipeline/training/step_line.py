"""The line that says where training stands: which parts it has, and which of them fit into a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.terminal.progress import duration

GAP = "  "


@dataclass(frozen=True)
class Standing:
    """Where a run stands. What is None is not known yet, and not shown."""

    phase: str
    step: int  # steps done
    num_steps: int
    steps_per_epoch: int
    lr: float
    loss: float | None = None  # mean over the last window and all ranks
    top1: float | None = None  # fraction of the last window's images
    val_top1: float | None = None  # fraction, of the last evaluation
    r_s: float | None = None
    images_per_second: float | None = None
    data_wait_share: float | None = None  # fraction of the last window's time
    model_flops: float | None = None  # floating-point operations per second, of all ranks; shown on GPUs
    peak_gpu_gib: float | None = None  # of the rank that needed most, in the last window
    phase_seconds_left: float | None = None
    run_seconds_left: float | None = None


def parts(at: Standing) -> list[tuple[int, str]]:
    """Return the parts of the line from left to right, each with its rank: the highest are left out first."""
    epochs = at.num_steps / at.steps_per_epoch
    shown: list[tuple[int, str, float | None]] = [
        (0, at.phase, 0),
        (4, f"epoch {at.step / at.steps_per_epoch:.{1 if epochs < 1000 else 0}f}/{epochs:.4g}", 0),
        (1, f"step {at.step}/{at.num_steps}", 0),
        (2, "loss {:.4f}" if (at.loss or 0) < 1000 else "loss {:.3g}", at.loss),
        (8, "top-1 {:.1%}", at.top1),
        (5, "val {:.1%}", at.val_top1),
        (9, "lr {:.3g}", at.lr),
        (7, "R_s {:.3f}", at.r_s),
        (6, "{:.0f} images/s", at.images_per_second),
        (10, "wait {:.0%}", at.data_wait_share),
        (12, "{:.1f} TFLOP/s", at.model_flops and at.model_flops / 1e12),
        (13, "peak {:.1f} GiB", at.peak_gpu_gib),
        (11, f"phase {duration(at.phase_seconds_left or 0)}", at.phase_seconds_left),
        (3, f"run {duration(at.run_seconds_left or 0)} left", at.run_seconds_left),
    ]
    return [(rank, text.format(value)) for rank, text, value in shown if value is not None]


def whole(given: Iterable[tuple[int, str]]) -> str:
    """Return all parts as one line."""
    return GAP.join(text for _, text in given)


def brief(at: Standing) -> str:
    """Return the loss, the speed and the time left, as far as they are known; for the line of an evaluation."""
    shown = [
        ("training loss {:.4f}" if (at.loss or 0) < 1000 else "training loss {:.3g}", at.loss),
        ("{:.0f} images/s", at.images_per_second),
        (f"{duration(at.run_seconds_left or 0)} left", at.run_seconds_left),
    ]
    return ", ".join(text.format(value) for text, value in shown if value is not None)


def fitting(given: Iterable[tuple[int, str]], columns: int) -> str:
    """Return the line without the parts of the highest ranks, so that it has at most so many columns.

    The part of the lowest rank is kept.
    """
    kept = list(given)
    while len(whole(kept)) > columns and len(kept) > 1:
        kept.remove(max(kept))
    return whole(kept)
