"""Evaluation of tickets: metrics of predictions, and BatchNorm recalibration.

The names exported here need only torch and numpy. Prediction and reports are in the modules of this
folder (``predict``, ``members``, ``report``, …), which the launchers use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.evaluation.batchnorm import recalibrate
    from pipeline.evaluation.metrics import (
        Bin,
        adaptive_ece,
        best_temperature,
        brier,
        corruption_mean,
        disagreement,
        disagreement_matrix,
        ece,
        ensemble,
        max_softmax,
        negative_entropy,
        nll,
        ood_auroc,
        ood_fpr95,
        pairwise_kl,
        reliability,
        scaled,
        top1,
        top5,
    )

__all__ = [
    "Bin",
    "adaptive_ece",
    "best_temperature",
    "brier",
    "corruption_mean",
    "disagreement",
    "disagreement_matrix",
    "ece",
    "ensemble",
    "max_softmax",
    "negative_entropy",
    "nll",
    "ood_auroc",
    "ood_fpr95",
    "pairwise_kl",
    "recalibrate",
    "reliability",
    "scaled",
    "top1",
    "top5",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "Bin": "pipeline.evaluation.metrics",
        "adaptive_ece": "pipeline.evaluation.metrics",
        "best_temperature": "pipeline.evaluation.metrics",
        "brier": "pipeline.evaluation.metrics",
        "corruption_mean": "pipeline.evaluation.metrics",
        "disagreement": "pipeline.evaluation.metrics",
        "disagreement_matrix": "pipeline.evaluation.metrics",
        "ece": "pipeline.evaluation.metrics",
        "ensemble": "pipeline.evaluation.metrics",
        "max_softmax": "pipeline.evaluation.metrics",
        "negative_entropy": "pipeline.evaluation.metrics",
        "nll": "pipeline.evaluation.metrics",
        "ood_auroc": "pipeline.evaluation.metrics",
        "ood_fpr95": "pipeline.evaluation.metrics",
        "pairwise_kl": "pipeline.evaluation.metrics",
        "recalibrate": "pipeline.evaluation.batchnorm",
        "reliability": "pipeline.evaluation.metrics",
        "scaled": "pipeline.evaluation.metrics",
        "top1": "pipeline.evaluation.metrics",
        "top5": "pipeline.evaluation.metrics",
    },
)
