"""Networks by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports

if TYPE_CHECKING:
    from pipeline.models.registry import build, build_for, image_size, outline, outline_for

__all__ = ["build", "build_for", "image_size", "outline", "outline_for"]

__getattr__ = lazy_exports(
    __name__,
    {
        "build": "pipeline.models.registry",
        "build_for": "pipeline.models.registry",
        "image_size": "pipeline.models.registry",
        "outline": "pipeline.models.registry",
        "outline_for": "pipeline.models.registry",
    },
)
