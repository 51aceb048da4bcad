"""The report as text: a main table, and further tables for what was evaluated on request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch
    from pipeline.evaluation.report import Report, ReportRow

# key of ``ReportRow.more`` -> heading, factor, decimals
MORE = {
    "corrupted_top1": ("corrupted top-1 %", 100, 2),
    "corrupted_nll": ("corrupted NLL", 1, 4),
    "corrupted_ece": ("corrupted ECE %", 100, 2),
    "extra_corrupted_top1": ("extra corrupted top-1 %", 100, 2),
    "extra_corrupted_nll": ("extra corrupted NLL", 1, 4),
    "extra_corrupted_ece": ("extra corrupted ECE %", 100, 2),
    "fgsm_top1": ("FGSM top-1 %", 100, 2),
    "pgd_top1": ("PGD top-1 %", 100, 2),
    "temperature": ("temperature", 1, 3),
    "scaled_nll": ("scaled NLL", 1, 4),
    "scaled_ece": ("scaled ECE %", 100, 2),
}
OOD = {
    "_auroc_max_softmax": "AUROC %",
    "_auroc_entropy": "AUROC % entropy",
    "_fpr95_max_softmax": "FPR95 %",
    "_fpr95_entropy": "FPR95 % entropy",
}

SPEED_NOTE = "ms an image: one image alone, processor time of one thread; median and 99th percentile of 200 calls."


def main_cells(report: Report) -> list[list[str]]:
    """Return headings and rows of the main table."""
    heads = ["", "top-1 %", "NLL", "ECE %", "density", "R_s", "train ×", "test ×", "parameters"]
    return [heads] + [
        [
            row.name,
            f"{100 * row.top1:.2f}",
            f"{row.nll:.4f}",
            f"{100 * row.ece:.2f}",
            f"{row.density:.4f}",
            f"{row.r_s:.3f}",
            "–" if row.training_flops_ratio is None else f"{row.training_flops_ratio:.3f}",
            f"{row.inference_flops_ratio:.3f}",
            f"{row.num_parameters:,}",
        ]
        for row in report.rows
    ]


def calibration_cells(report: Report) -> list[list[str]]:
    """Return headings and rows of the metrics that do not fit into the main table."""
    heads = ["", "top-5 %", "Brier", "adaptive ECE %"]
    return [heads] + [
        [row.name, f"{100 * row.top5:.2f}", f"{row.brier:.4f}", f"{100 * row.adaptive_ece:.2f}"] for row in report.rows
    ]


def speed_cells(report: Report) -> list[list[str]]:
    """Return headings and rows of milliseconds an image; empty if nothing was timed."""
    if not report.dense_ms:
        return []
    rows = [(row.name, row.more) for row in report.rows] + [("the same by torch, dense", report.dense_ms)]
    return [["", "ms an image", "p99", "× dense"]] + [
        [name, f"{ms['ms_p50']:.3f}", f"{ms['ms_p99']:.3f}", f"{ms['ms_p50'] / report.dense_ms['ms_p50']:.3f}"]
        for name, ms in rows
    ]


def further_cells(report: Report) -> list[list[list[str]]]:
    """Return headings and rows of the further tables, one per subject: corruptions, attacks, and so on."""
    found = dict.fromkeys(key for row in report.rows for key in row.more)
    subjects = [
        [key for key in MORE if key in found and key.startswith(start)]
        for start in ("corrupted_", "extra_corrupted_", ("fgsm_", "pgd_"), ("temp", "scaled_"))
    ]
    sets = dict.fromkeys(
        key.removesuffix(end).removeprefix("ood_") for key in found for end in OOD if key.endswith(end)
    )
    subjects += [[f"ood_{name}{end}" for end in OOD] for name in sets]
    return [
        [[_subject(keys[0]), *map(_heading, keys)]]
        + [_cells(row, keys) for row in report.rows if row.more.keys() & keys]
        for keys in subjects
        if keys
    ]


def format_table(report: Report) -> str:
    """Return the tables as aligned text, at most 100 columns wide, with notes on what was measured."""
    parts = [aligned(main_cells(report))]
    run = ", ".join(f"{key} {value}" for key, value in report.run.items())
    parts[0] += [f"{run}; {report.num_images:,} images."]
    trained = "" if report.dense_reference_epochs is None else f", trained for {report.dense_reference_epochs:g} epochs"
    parts[0] += [f"train ×, test ×: FLOPs relative to a dense network{trained}."]
    if report.disagreement is not None and report.kl is not None:
        parts[0] += [
            f"Between tickets: {100 * report.disagreement:.2f}% of predictions differ, KL {report.kl:.4f} nats."
        ]
    if cells := speed_cells(report):
        parts += [["", *aligned(cells), SPEED_NOTE]]
    parts += [["", *aligned(cells)] for cells in further_cells(report)]
    if report.num_attacked is not None:
        parts += [["", f"FGSM, PGD: on {report.num_attacked:,} images."]]
    return "\n".join(line for part in parts for line in part)


def _subject(key: str) -> str:
    end = next((end for end in OOD if key.startswith("ood_") and key.endswith(end)), "")
    return f"against {key.removesuffix(end).removeprefix('ood_')}" if end else ""


def _heading(key: str) -> str:
    return MORE[key][0] if key in MORE else next(heading for end, heading in OOD.items() if key.endswith(end))


def _cells(row: ReportRow, keys: Sequence[str]) -> list[str]:
    cells = [row.name]
    for key in keys:
        _, factor, decimals = MORE.get(key, ("", 100, 2))
        cells.append(f"{factor * row.more[key]:.{decimals}f}" if key in row.more else "–")
    return cells


def aligned(cells: Sequence[Sequence[str]], *, num_left: int = 1) -> list[str]:
    """Return headings and rows as lines of aligned text; the first ``num_left`` columns are aligned to the left."""
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    table = [
        "  ".join(f"{cell:{'<' if i < num_left else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in cells
    ]
    return [table[0], "-" * len(table[0]), *table[1:]]
