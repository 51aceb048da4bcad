"""Sparse training for your own training loop.

``METHODS``, ``Strategy``, ``method`` and ``timetable`` need the standard library only, all else
torch and numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.sparse.flops import layer_macs
    from pipeline.sparse.initial import masks_at_start
    from pipeline.sparse.layers import sparse_weights
    from pipeline.sparse.request import TopologyUpdate
    from pipeline.sparse.sparsifier import Sparsifier
    from pipeline.sparse.strategy import METHODS, Strategy, method
    from pipeline.sparse.timing import DueUpdate, UpdateSchedule, timetable

__all__ = [
    "METHODS",
    "DueUpdate",
    "Sparsifier",
    "Strategy",
    "TopologyUpdate",
    "UpdateSchedule",
    "layer_macs",
    "masks_at_start",
    "method",
    "sparse_weights",
    "timetable",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "DueUpdate": "pipeline.sparse.timing",
        "UpdateSchedule": "pipeline.sparse.timing",
        "timetable": "pipeline.sparse.timing",
        "METHODS": "pipeline.sparse.strategy",
        "Sparsifier": "pipeline.sparse.sparsifier",
        "Strategy": "pipeline.sparse.strategy",
        "TopologyUpdate": "pipeline.sparse.request",
        "layer_macs": "pipeline.sparse.flops",
        "masks_at_start": "pipeline.sparse.initial",
        "method": "pipeline.sparse.strategy",
        "sparse_weights": "pipeline.sparse.layers",
    },
)
