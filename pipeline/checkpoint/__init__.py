"""Checkpoints for exact resume: their content, writing and verification."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.checkpoint.checkpoints import Checkpoints, Resumed

__all__ = ["Checkpoints", "Resumed"]

__getattr__ = lazy_exports(
    __name__,
    {
        "Checkpoints": "pipeline.checkpoint.checkpoints",
        "Resumed": "pipeline.checkpoint.checkpoints",
    },
)
